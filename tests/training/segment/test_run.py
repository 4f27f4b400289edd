"""Segmenters are trained, written, tested, resumed and measured at every rung."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from adapters import Bank
from adapters.segmentation import SegmentationModel, open_segmentation
from tests.training.segment.conftest import NAMES, recipe
from tocom import ConfigError, DataError, Ladder, Variant, cost, load_backbone
from tocom.reduction import AroundMLP
from training.attach import attach
from training.config import DistillConfig
from training.distill import distill
from training.presets import read_recipe
from training.program.dry_run import dry_run
from training.run_folder import read_metrics
from training.segment import measure as module
from training.segment.config import EvaluateSegmentConfig, SegmentConfig
from training.segment.job import Segmenting
from training.segment.measure import evaluate_segment
from training.segment.metrics import IGNORED
from training.segment.run import scene_batches, segment
from training.segment.scenes import SceneSet, classes_of


@pytest.fixture(scope="module")
def run(scenes: Path, model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that learned something."""
    folder = tmp_path_factory.mktemp("run") / "squares"
    segment(recipe(scenes, model_folder, loop={"epochs": 8}, unseen="test"), folder)
    return folder


def test_it_learns_what_squares_are(run: Path) -> None:
    task = open_segmentation(run / "task")
    assert task.info.class_names == NAMES
    assert task.info.window == (32, 32)
    said: Any = task.info.training
    assert said["labels"] == {"first": 0, "ignored": [9]}
    assert said["pictures"] == 12
    lines = read_metrics(run)
    assert lines[-1]["loss"] < 0.7 * lines[0]["loss"]
    assert lines[-1]["unseen_miou_0"] > lines[1]["unseen_miou_0"]
    assert said["test"]["pictures"] == 4
    # What was watched last is what is written, but for fp16.
    assert said["test"]["miou"] == pytest.approx(lines[-1]["unseen_miou_0"], abs=2)
    assert set(said["test"]["iou"]) == set(NAMES)


def test_a_run_that_is_done_is_not_done_again(
    run: Path, scenes: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("training.segment.run._make", None)
    monkeypatch.setattr("training.segment.run.count_all", None)
    same = recipe(scenes, model_folder, loop={"epochs": 8}, unseen="test")
    assert segment(same, run) == run / "task"
    with pytest.raises(ConfigError, match="holds a run of another recipe: dropout 0.1 there"):
        segment(same.model_copy(update={"dropout": 0.0}), run)


@pytest.mark.parametrize("method", ["frozen", "adaptformer", "full"])
@pytest.mark.parametrize("decoder", ["mask", "linear"])
def test_a_stopped_run_goes_on_to_the_same_weights(
    method: str, decoder: str, scenes: Path, model_folder: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    config = recipe(scenes, model_folder, method=method, decoder=decoder, source=1)
    whole = open_segmentation(segment(config, tmp_path / "whole"))
    losses, seen = Segmenting.losses, []

    def stops(self: Segmenting, *arguments: Any) -> Any:
        seen.append(arguments)
        if len(seen) == 4:
            raise KeyboardInterrupt
        return losses(self, *arguments)

    monkeypatch.setattr(Segmenting, "losses", stops)
    with pytest.raises(KeyboardInterrupt):
        segment(config, tmp_path / "stopped")
    monkeypatch.setattr(Segmenting, "losses", losses)
    again = open_segmentation(segment(config, tmp_path / "stopped"))
    assert whole.tensors.keys() == again.tensors.keys()
    for name, tensor in whole.tensors.items():
        assert torch.equal(tensor, again.tensors[name]), name
    assert again.info.digest == whole.info.digest
    assert again.info.method == ("adaptformer" if method == "adaptformer" else "frozen")
    before = load_backbone(str(model_folder))
    if method == "full":
        encoder = load_backbone(str(tmp_path / "whole" / "model"))
        assert encoder.source == 1
        assert encoder.tuned_from == before.digest
        assert whole.info.backbone.digest == encoder.digest != before.digest
        assert encoder.model.num_classes == 0
    else:
        assert whole.info.backbone.digest == before.digest
    if method == "adaptformer":
        assert whole.tensors["adaptformer.up"].abs().max() > 0


def test_a_crop_without_a_pixel_that_counts_teaches_nothing(
    scenes: Path, model_folder: Path
) -> None:
    config = recipe(scenes, model_folder)
    job = Segmenting(load_backbone(str(model_folder)), config, classes_of(config.scenes))
    images = torch.randn(1, 3, 32, 32)
    labels = torch.full((1, 32, 32), IGNORED, dtype=torch.uint8)
    (loss,) = job.losses(images, labels, 0)
    assert loss.item() == 0
    labels[0, 0, 0] = 2
    (loss,) = job.losses(images, labels, 0)
    assert loss.item() > 0


def asked(run: Path, scenes: Path, model_folder: Path, **changes: Any) -> EvaluateSegmentConfig:
    said = {
        "backbone": {"name": str(model_folder)},
        "task": str(run / "task"),
        "scenes": {"path": str(scenes)},
        "ladder": "around-mlp",
        "targets": (4, 16),
        "batch_size": 2,
        "workers": 0,
        "save_every": 1,
    }
    return EvaluateSegmentConfig.model_validate(said | changes)


def test_every_rung_is_measured_with_and_without_a_bank(
    run: Path, scenes: Path, model_folder: Path, pictures: Path, tmp_path: Path
) -> None:
    bank = distill(
        read_recipe(
            DistillConfig,
            "deit-tiny-small-data",
            [
                f"backbone.name={model_folder}", f"pictures={pictures}", "ladder=around-mlp",
                "max_rate=16", "beyond=0", "unseen=0", "relative=false", "tokens=1.0",
                "loop.steps=2", "loop.batch_size=4", "loop.workers=0", "students=1", "sources=1",
            ],
        ),
        tmp_path / "bank",
    )  # fmt: skip
    config = asked(run, scenes, model_folder, bank=str(bank), ladder=None, multiplier=1.0)
    path = evaluate_segment(config, tmp_path / "evaluation")
    result = json.loads(path.read_text())
    rows = {row["target"]: row for row in result["rows"]}
    assert set(rows) == {0, 4, 16}
    assert rows[0]["plain"]["agreement"] == 100
    assert rows[0]["share"] == 1
    assert rows[16]["share"] < rows[4]["share"] < 1
    assert rows[16]["plain"]["agreement"] < 100
    assert rows[16]["bank"]["error"] >= 0
    assert rows[16]["bank"]["change"] == pytest.approx(
        rows[16]["bank"]["miou"] - rows[16]["plain"]["miou"], abs=0.011
    )
    # Rung 0 is what the run tested.
    tested: Any = open_segmentation(run / "task").info.training["test"]
    assert rows[0]["plain"]["miou"] == tested["miou"]
    assert result["pictures"] == {"name": "data.tar, test", "count": 4}
    model = load_backbone(str(model_folder)).model
    # 40 x 48 pixels come to 32 x 40: two windows of 32 x 32.
    ladder = Ladder("x", AroundMLP(), ((0, 0), (8, 8)), 16)
    spent = cost(model, 1, ladder=ladder)
    assert rows[16]["gmacs"] == round(2 * (spent.macs - spent.head) / 1e9, 4)
    assert "| 16 |" in path.with_suffix(".md").read_text()
    assert evaluate_segment(config, tmp_path / "evaluation") == path  # not measured again
    # Its folders can keep it, and stay what they are.
    task = Path(shutil.copytree(run / "task", tmp_path / "task"))
    assert attach(path, task) == task / "task.json"
    assert open_segmentation(task).info.evaluation == result
    assert open_segmentation(task).info.digest == open_segmentation(run / "task").info.digest
    assert attach(path, bank) == bank / "bank.json"
    assert Bank.load(bank).info.evaluation["results"] == [result]
    with pytest.raises(ConfigError, match="is of the task"):
        attach(path, other_task(task, tmp_path / "other"))


def other_task(task: Path, folder: Path) -> Path:
    """The same task with another class name, which is another one."""
    model = open_segmentation(task)
    names = ("other", *model.info.class_names[1:])
    info = model.info.model_copy(update={"class_names": names, "digest": ""})
    return SegmentationModel(info, model.tensors).save(folder)


def test_a_stopped_measurement_goes_on_to_the_same_figures(
    run: Path, scenes: Path, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = asked(run, scenes, model_folder, batch_size=1)
    whole = evaluate_segment(config, tmp_path / "whole").read_text()
    count, seen = module.counts, []

    def stops(*arguments: Any) -> Any:
        seen.append(arguments)
        if len(seen) == 8:
            raise KeyboardInterrupt
        return count(*arguments)

    monkeypatch.setattr(module, "counts", stops)
    with pytest.raises(KeyboardInterrupt):
        evaluate_segment(config, tmp_path / "stopped")
    monkeypatch.setattr(module, "counts", count)
    assert evaluate_segment(config, tmp_path / "stopped").read_text() == whole


def test_a_task_or_scenes_that_changed_meanwhile_are_noticed(
    run: Path, scenes: Path, model_folder: Path, tmp_path: Path
) -> None:
    data = shutil.copytree(scenes.with_suffix(""), tmp_path / "data")
    shutil.copytree(run / "task", tmp_path / "task")
    config = asked(tmp_path, data, model_folder, targets=(4,))
    path = evaluate_segment(config, tmp_path / "evaluation")
    assert evaluate_segment(config, tmp_path / "evaluation") == path
    path.unlink()
    (data / "test" / "images" / "0.png").rename(tmp_path / "0.png")
    with pytest.raises(ConfigError, match=r"begun with 4 scenes of .*data, test; there are 3 now"):
        evaluate_segment(config, tmp_path / "evaluation")
    shutil.rmtree(tmp_path / "task")
    other_task(run / "task", tmp_path / "task")
    with pytest.raises(ConfigError, match="measured with another task .*; choose another run"):
        evaluate_segment(config, tmp_path / "evaluation")


def test_scenes_that_cannot_be_read_are_not_watched(
    scenes: Path, model_folder: Path, tmp_path: Path
) -> None:
    data = shutil.copytree(scenes.with_suffix(""), tmp_path / "data")
    shutil.copytree(data / "test", data / "watched")
    (data / "watched" / "images" / "0.png").write_bytes(b"no picture")
    loop = {"epochs": 0.5, "watch_every": 1}
    config = recipe(data, model_folder, loop=loop, unseen="watched")
    with pytest.raises(DataError, match=r"0\.png of .* cannot be read"):
        segment(config, tmp_path / "stop")
    config = recipe(data, model_folder, loop={**loop, "on_unreadable": "skip"}, unseen="watched")
    segment(config, tmp_path / "skip")
    assert all("unseen_miou_0" in line for line in read_metrics(tmp_path / "skip"))


def test_agreement_is_with_rung_0(
    run: Path, scenes: Path, model_folder: Path, tmp_path: Path
) -> None:
    path = evaluate_segment(asked(run, scenes, model_folder), tmp_path / "evaluation")
    row = json.loads(path.read_text())["rows"][-1]
    segmenter = open_segmentation(run / "task").on(load_backbone(str(model_folder)))
    labelled = recipe(scenes, model_folder).scenes
    read = SceneSet(labelled, "test", classes_of(labelled))
    ladder = Ladder("around", AroundMLP(), ((0, 0), (8, 8)), 16)
    same = 0
    for ((image, labels),) in scene_batches(segmenter, read, range(4), 1, 0):
        size = (labels.shape[0], labels.shape[1])
        answers = [
            segmenter.classes(segmenter.scores(image[None], Variant(rate, ladder=ladder)), size)
            for rate in (0, 1)
        ]
        same += int((answers[0] == answers[1]).sum())
    assert row["plain"]["agreement"] == pytest.approx(100 * same / (4 * 40 * 48), abs=0.006)


def test_a_dry_run_tells_what_would_run(run: Path, scenes: Path, model_folder: Path) -> None:
    said = dry_run(recipe(scenes, model_folder), run.parent / "other")
    assert "3: ground, red, blue" in said
    assert "train: 12" in said
    assert "4 of 6 pictures, 2 epochs" in said
    said = dry_run(asked(run, scenes, model_folder), run.parent / "other")
    assert "4 pictures at every rate" in said


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"width": 18, "heads": 4}, "multiple of its heads, got 18 for 4"),
        ({"augment": {"crop": (30, 32)}}, "a window has whole patches of 8 x 8 pixels, got 30"),
        ({"stride": (32, 40)}, "would leave gaps"),
        ({"source": 99, "ladder": {"method": "around-mlp", "steps": 4}}, "in 0..4, got 99"),
    ],
)
def test_what_does_not_fit_together_is_told_before_any_compute(
    changes: dict[str, Any], said: str, scenes: Path, model_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=said):
        segment(recipe(scenes, model_folder, **changes), tmp_path / "run")


@pytest.mark.parametrize("preset", ["ade20k-segmenter", "camvid"])
def test_presets_are_segmenters_recipe(preset: str) -> None:
    config = read_recipe(SegmentConfig, preset)
    steps = config.loop.over(20_210)
    optimizer = steps.make_optimizer(torch.nn.Linear(2, 2))
    scheduler = steps.make_scheduler(optimizer)
    if preset == "ade20k-segmenter":
        assert steps.steps == 161_680
        assert isinstance(optimizer, torch.optim.SGD)
        assert optimizer.param_groups[0]["momentum"] == 0.9
        scheduler.step_update(steps.steps // 2)
        expected = 1e-5 + (1e-3 - 1e-5) * 0.5**0.9
        assert optimizer.param_groups[0]["lr"] == pytest.approx(expected)
