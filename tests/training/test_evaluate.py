import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from timm.data import ImageNetInfo

from adapters import Bank, compose
from tests.training.banks import random_bank
from tests.training.pictures.files import write_tar
from tocom import Backbone, ConfigError, DataError, RateError, forward, load_backbone
from training import evaluate as module
from training import measuring
from training.config import DistillConfig
from training.evaluate import evaluate, matrix_table, sign_test, table
from training.ladders.compare_config import CompareConfig
from training.ladders.search_config import LadderSearchConfig
from training.measuring import Measurement, class_indices, load_model, standard_error
from training.measuring_config import CalibrateConfig, EvaluateConfig
from training.pictures.augment import evaluation_transform
from training.pictures.batches import evaluation_batches
from training.pictures.config import PicturesConfig
from training.plot import changes, plot_evaluation, plot_matrix

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def bank(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    bank = random_bank(load_backbone(str(model_folder)))
    return bank.save(tmp_path_factory.mktemp("banks") / "bank")


@pytest.fixture
def config(pictures: Path, model_folder: Path, bank: Path) -> EvaluateConfig:
    return EvaluateConfig.model_validate(
        {
            "backbone": {"name": str(model_folder)},
            "bank": str(bank),
            "pictures": {"path": str(pictures)},
            "sources": [0, 3],
            "batch_size": 7,
            "workers": 0,
        }
    )


def changed(config: EvaluateConfig, **changes: Any) -> EvaluateConfig:
    return EvaluateConfig.model_validate(config.model_dump() | changes)


def read(path: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(path.read_text())
    return result


def cell(result: dict[str, Any], source: int, target: int) -> dict[str, Any]:
    return next(r for r in result["rows"] if (r["source"], r["target"]) == (source, target))


def test_figures_are_those_of_single_forwards(config: EvaluateConfig, tmp_path: Path) -> None:
    backbone, bank = load_backbone(config.backbone.name), Bank.load(str(config.bank))
    result = read(evaluate(config, tmp_path / "out"))
    assert [(row["source"], row["target"]) for row in result["rows"]] == [
        (source, target) for source in (0, 3) for target in range(5)
    ]
    assert result["weights_digest"] == backbone.digest
    row = cell(result, 3, 1)

    ((images, labels),) = evaluation_batches(backbone, [config.pictures])
    expected = forward(backbone.model, images, 3).log_softmax(-1)
    kls, hits, agreed = {}, {}, {}
    for what, delta in (("plain", None), ("bank", compose(bank, 3, 1))):
        logits = forward(backbone.model, images, 1, delta)
        kls[what] = (expected.exp() * (expected - logits.log_softmax(-1))).sum(-1)
        hits[what] = (logits.argmax(-1) == labels).int()
        agreed[what] = (logits.argmax(-1) == expected.argmax(-1)).int()
        assert row[what]["kl"] == pytest.approx(kls[what].mean().item(), abs=2e-5)
        assert row[what]["top1"] == pytest.approx(100 * hits[what].float().mean().item(), abs=0.01)
    for name, each in (("top1", hits), ("agreement", agreed)):
        assert row["bank"][f"{name}_won"] == (each["bank"] > each["plain"]).sum()
        assert row["bank"][f"{name}_lost"] == (each["bank"] < each["plain"]).sum()
    change = kls["bank"] - kls["plain"]
    assert row["bank"]["kl_change"] == pytest.approx(change.mean().item(), abs=2e-5)
    error = change.std().item() / math.sqrt(len(change))
    assert row["bank"]["kl_change_se"] == pytest.approx(error, rel=1e-3)
    same = cell(result, 0, 0)
    assert same["plain"] | {"top1": 0} == {"top1": 0, "agreement": 100.0, "kl": 0.0}
    assert "bank" not in same


@pytest.mark.rendered
def test_what_comes_out(config: EvaluateConfig, tmp_path: Path) -> None:
    result = read(evaluate(config, tmp_path))
    assert (tmp_path / "evaluation.md").read_text().count("\n| ") == 11
    for name in ("evaluation", "matrix"):
        for suffix in ("svg", "png"):
            assert (tmp_path / f"{name}.{suffix}").stat().st_size > 1000
    matrix = (tmp_path / "matrix.md").read_text()
    assert matrix == matrix_table(result)
    assert matrix.count("\n| 3 | ") == 3  # a table for each measure
    row = cell(result, 3, 4)
    shown = f"{row['plain']['kl']:.4f} / {row['bank']['kl']:.4f}"
    line = next(line for line in reversed(matrix.splitlines()) if line.startswith("| 3 |"))
    assert line.split(" | ")[-1] == f"{shown} |"
    sources, targets, cells = changes(result, "kl")
    assert (sources, targets) == ([0, 3], [0, 1, 2, 3, 4])
    assert np.isnan(cells[1, 3])
    assert cells[1, 4] == pytest.approx(100 * (row["bank"]["kl"] / row["plain"]["kl"] - 1))


def test_one_source_makes_no_matrix_and_is_the_models_own(
    config: EvaluateConfig, tmp_path: Path
) -> None:
    result = read(evaluate(changed(config, sources=[], targets=[2]), tmp_path))
    assert [(row["source"], row["target"]) for row in result["rows"]] == [(0, 2)]
    assert not list(tmp_path.glob("matrix*"))


def test_without_labels_there_is_no_top1(config: EvaluateConfig, tmp_path: Path) -> None:
    folders = tmp_path / "folders"
    for name in ("x", "y"):  # no classes of the model
        (folders / name).mkdir(parents=True)
        picture = Path(config.pictures.path).parent / "red" / "0.png"
        (folders / name / "0.png").write_bytes(picture.read_bytes())
    unlabelled = changed(config, pictures={"path": str(folders)}, labelled=False)
    with pytest.raises(DataError, match="labelled=false does without"):
        evaluate(changed(unlabelled, labelled=True), tmp_path / "out")
    path = evaluate(unlabelled, tmp_path / "out")
    assert "top1" not in path.read_text()
    for name in ("evaluation.md", "matrix.md"):
        assert "top-1" not in (path.parent / name).read_text()
    assert cell(read(path), 0, 4)["bank"].keys() >= {"kl", "agreement", "agreement_p", "kl_change"}


@pytest.mark.parametrize(
    "read", [EvaluateConfig, CalibrateConfig, CompareConfig, LadderSearchConfig, DistillConfig]
)
def test_every_recipe_that_looks_at_pictures_takes_a_crop(read: Any) -> None:
    assert read.model_fields["crop_pct"].default is None


def test_a_recipe_may_see_more_or_less_of_the_pictures(
    config: EvaluateConfig, model_folder: Path
) -> None:
    def resized(crop_pct: float | None) -> int:
        backbone = load_model(config.backbone, None, crop_pct)
        side: int = evaluation_transform(backbone).transforms[0].size
        return side

    # The shorter side of a picture, of which the middle 32 pixels are seen.
    assert [resized(crop) for crop in (None, 0.8, 1.0)] == [35, 40, 32]
    with pytest.raises(ValueError, match="crop_pct"):
        changed(config, crop_pct=1.1)


def test_an_evaluation_sees_the_crop_of_its_recipe(config: EvaluateConfig, tmp_path: Path) -> None:
    config = changed(config, sources=[0], targets=[2])
    own, other = (
        cell(read(evaluate(changed(config, crop_pct=crop), tmp_path / str(crop))), 0, 2)["plain"]
        for crop in (None, 0.5)
    )
    assert own["kl"] != other["kl"]


def test_without_a_bank_rates_are_up_to_max_rate(config: EvaluateConfig, tmp_path: Path) -> None:
    result = read(evaluate(changed(config, bank=None, sources=[0], max_rate=2), tmp_path))
    assert result["bank"] is None
    assert [row["target"] for row in result["rows"]] == [0, 1, 2]
    assert not any("bank" in row for row in result["rows"])


def test_a_rate_beyond_the_bank_is_refused_before_anything_is_written(
    config: EvaluateConfig, tmp_path: Path
) -> None:
    with pytest.raises(RateError, match=r"target rate must be in 0\.\.4, got 5"):
        evaluate(changed(config, targets=[5]), tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- resuming


@pytest.mark.parametrize("killed_after", [1, 3, 4])
def test_a_killed_run_goes_on_to_the_same_figures(
    config: EvaluateConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed_after: int
) -> None:
    whole = evaluate(config, tmp_path / "whole").read_text()
    write, writes, seen = measuring.replace_file, [], []

    def die(path: Path, text: str) -> None:
        if path.name == "progress.json":
            writes.append(text)
            if len(writes) > killed_after:
                path.with_name(f".{path.name}.0123abcd").write_text("half of it")
                raise SystemExit("killed")
        write(path, text)

    with monkeypatch.context() as patched:
        patched.setattr(measuring, "replace_file", die)
        # 24 pictures are 4 batches; after the last one, before the result.
        patched.setattr(module, "plot_evaluation", lambda *_: 1 / 0)
        with pytest.raises(SystemExit if killed_after < 4 else ZeroDivisionError):
            evaluate(config, tmp_path / "killed")
    embed = measuring.embed

    def count(model: Any, images: torch.Tensor) -> torch.Tensor:
        seen.append(len(images))
        return embed(model, images)

    monkeypatch.setattr(measuring, "embed", count)
    assert evaluate(config, tmp_path / "killed").read_text() == whole
    assert sum(seen) == 24 - min(24, 7 * killed_after)
    assert not list((tmp_path / "killed").glob(".*"))


def test_a_finished_run_is_returned_at_once(
    config: EvaluateConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = evaluate(config, tmp_path)
    monkeypatch.setattr(module, "measure", lambda *_: pytest.fail("measured again"))
    assert evaluate(config, tmp_path) == path


@pytest.mark.parametrize("finished", [True, False])
def test_a_folder_of_something_else_is_refused_by_name(
    config: EvaluateConfig, model_folder: Path, tmp_path: Path, finished: bool
) -> None:
    path = evaluate(config, tmp_path / "run")
    if not finished:
        path.unlink()
    other_recipe = r"holds a run of another recipe: targets \[.*\] there, \[.*\] here"
    with pytest.raises(ConfigError, match=other_recipe):
        evaluate(changed(config, targets=[1]), tmp_path / "run")

    claimed = read(tmp_path / "run" / "config.json")
    for key, what in (("weights_digest", "backbone"), ("bank_digest", "bank")):
        forged = json.dumps(claimed | {key: "0123"})
        (tmp_path / "run" / "config.json").write_text(forged)
        with pytest.raises(ConfigError, match=rf"another {what} \({key} 0123, now {claimed[key]}"):
            evaluate(config, tmp_path / "run")


def test_a_result_without_its_recipe_is_refused(config: EvaluateConfig, tmp_path: Path) -> None:
    (tmp_path / "evaluation.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"no config\.json that says what was measured"):
        evaluate(config, tmp_path)


def test_pictures_that_came_meanwhile_are_noticed(config: EvaluateConfig, tmp_path: Path) -> None:
    evaluate(config, tmp_path).unlink()
    progress = read(tmp_path / "progress.json")
    (tmp_path / "progress.json").write_text(json.dumps(progress | {"of": 23, "done": 7}))
    with pytest.raises(ConfigError, match=r"begun with 23 pictures of .*; there are 24 now"):
        evaluate(config, tmp_path)


# --- statistics


@pytest.mark.parametrize("won", [0, 1, 5, 17])
@pytest.mark.parametrize("lost", [0, 1, 6, 30])
def test_the_sign_test_is_the_exact_binomial_one(won: int, lost: int) -> None:
    tosses = won + lost
    # Two-sided: as far from the middle as seen, or farther.
    extreme = [k for k in range(tosses + 1) if abs(2 * k - tosses) >= abs(won - lost)]
    expected = sum(math.comb(tosses, k) for k in extreme) / 2**tosses
    assert sign_test(won, lost) == pytest.approx(expected, rel=1e-10)


def test_the_sign_test_of_many_pictures() -> None:
    assert sign_test(25_000, 25_000) == 1
    # The normal approximation, with its correction for continuity.
    expected = math.erfc((600 - 1) / math.sqrt(50_000) / math.sqrt(2))
    assert sign_test(25_300, 24_700) == pytest.approx(expected, rel=1e-2)
    assert 0 <= sign_test(50_000, 0) < 1e-300


def test_the_standard_error_of_a_mean() -> None:
    values = torch.tensor([0.1, 0.4, -0.2, 0.3], dtype=torch.float64)
    expected = values.std().item() / 2
    total, squares = values.sum().item(), (values**2).sum().item()
    assert standard_error(total, squares, 4) == pytest.approx(expected)
    assert standard_error(0.1, 0.01, 1) is None


# --- what older versions wrote


@pytest.mark.rendered
@pytest.mark.parametrize("name", ["deit_tiny_imagenet", "deit_tiny_caltech101"])
def test_older_results_stay_readable(name: str, tmp_path: Path) -> None:
    result = read(ROOT / "docs" / "results" / name / "evaluation.json")
    result.pop("weights_digest", None)
    for row in result["rows"]:
        row.pop("multiplier", None)
        if "bank" in row:
            row["bank"] = {key: row["bank"][key] for key in ("top1", "agreement", "kl")}
    assert re.search(r"^\| 0 \| 16 \|", table(result), re.MULTILINE)
    assert matrix_table(result)
    assert changes(result, "kl")[2].shape[1] == len({row["target"] for row in result["rows"]})
    plot_evaluation(result, tmp_path)
    plot_matrix(result, tmp_path)
    for name in ("evaluation.svg", "matrix.png"):
        assert (tmp_path / name).stat().st_size > 1000


# --- classes


def class_folders(root: Path, picture: bytes, *names: str) -> PicturesConfig:
    for name in names:
        (root / name).mkdir(parents=True)
        (root / name / "0.png").write_bytes(picture)
    return PicturesConfig(path=str(root))


def test_folders_are_classes_by_name_by_number_or_by_order(
    pictures: Path, model_folder: Path, tmp_path: Path
) -> None:
    backbone = load_backbone(str(model_folder))
    picture = (pictures.parent / "red" / "0.png").read_bytes()

    def folders(*names: str) -> PicturesConfig:
        return class_folders(tmp_path / "-".join(names), picture, *names)

    assert class_indices(PicturesConfig(path=str(pictures)), backbone) == [0, 1, 2]
    assert class_indices(folders("red", "blue"), backbone) == [0, 2]
    assert class_indices(folders("0001", "0002"), backbone) == [1, 2]
    assert class_indices(folders("x", "y", "z"), backbone) == [0, 1, 2]
    with pytest.raises(DataError, match="2 folders .* neither numbers nor names of the 3 classes"):
        class_indices(folders("x", "y"), backbone)


def test_shards_of_imagenet_are_its_classes(pictures: Path, tmp_path: Path) -> None:
    picture = (pictures.parent / "red" / "0.png").read_bytes()
    model = timm.create_model("vit_tiny_patch16_224", num_classes=1000, depth=1)
    imagenet = ImageNetInfo("imagenet-1k")
    backbone = Backbone(model, "tiny", "vit_tiny", tuple(imagenet.label_descriptions()))
    numbers = imagenet.label_names()

    def shards(name: str, files: dict[str, bytes], classes: str = "") -> list[int]:
        """Return the model's class of each picture, in the order of their names."""
        folder = tmp_path / name
        folder.mkdir()
        write_tar(folder / "000000.tar", files)
        if classes:
            (folder / "classes.txt").write_text(classes)
        measurement = Measurement(backbone, PicturesConfig(path=str(folder)), 2, 0, labelled=True)
        ((_, folders),) = evaluation_batches(backbone, [measurement.pictures], batch_size=2)
        assert measurement.classes is not None
        return measurement.classes[folders].tolist()

    files = {"a.png": picture, "a.cls": b"999", "b.png": picture, "b.cls": b"7"}
    assert shards("numbers", files) == [999, 7]
    files |= {"a.cls": b"1", "b.cls": b"0"}
    assert shards("named", files, f"{numbers[7]}\n{numbers[999]}\n") == [999, 7]
    inner = {f"{numbers[999]}/b.png": picture, f"{numbers[7]}/a.png": picture}
    assert sorted(shards("folders", inner)) == [7, 999]


def test_imagenets_folders_are_its_classes(pictures: Path, tmp_path: Path) -> None:
    picture = (pictures.parent / "red" / "0.png").read_bytes()
    model = timm.create_model("vit_tiny_patch16_224", num_classes=1000, depth=1)
    imagenet = ImageNetInfo("imagenet-1k")
    backbone = Backbone(model, "tiny", "vit_tiny", tuple(imagenet.label_descriptions()))
    numbers = imagenet.label_names()
    some = class_folders(tmp_path / "some", picture, numbers[7], numbers[999])
    assert class_indices(some, backbone) == [7, 999]
    whole = class_folders(tmp_path / "whole", picture, *numbers)
    assert class_indices(whole, backbone) == list(range(1000))
    last = class_folders(tmp_path / "last", picture, "0", "999")
    assert class_indices(last, backbone) == [0, 999]
    others = replace(backbone, class_names=tuple(f"my {i}" for i in range(1000)))
    with pytest.raises(DataError, match="2 folders .* neither numbers nor names of the 1000"):
        class_indices(some, others)
