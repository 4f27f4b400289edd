"""Pictures with several classes: tuned, measured, and written down as such."""

import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from adapters import TaskModel
from tests.training.banks import random_bank
from tests.training.test_distill import recipe as distilling
from tocom import BackboneError, ConfigError, DataError, forward, load_backbone
from training.config import FinetuneConfig
from training.distill import distill
from training.evaluate import evaluate
from training.finetune import finetune
from training.ladders.compare import compare_methods
from training.ladders.compare_config import CompareConfig
from training.measuring_config import EvaluateConfig
from training.multi_label.measures import mean_average_precision
from training.pictures.batches import evaluation_batches
from training.pictures.config import PicturesConfig
from training.pictures.sets import class_names, open_pictures
from training.tuning import Finetuning

CLASSES = ("blue", "green", "red", "cold", "never")


@pytest.fixture(scope="module")
def folder(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The three colours, of which two are cold as well, and some pictures of no class."""
    root = tmp_path_factory.mktemp("many")
    with tarfile.open(pictures) as tar:
        tar.extractall(root, filter="data")
    labels = {"blue": "0,3", "green": "3,1", "red": "2"}
    lines = [f"{each}/{i}.png {labels[each] if i else '-'}" for each in labels for i in range(8)]
    (root / "all.txt").write_text("\n".join(lines) + "\n")
    (root / "classes.txt").write_text("\n".join(CLASSES) + "\n")
    return root


def many(folder: Path) -> dict[str, str]:
    return {"path": str(folder), "list": "all.txt", "labels": "many"}


def config(folder: Path, model_folder: Path, **changes: Any) -> FinetuneConfig:
    said = {
        "name": "several",
        "backbone": {"name": str(model_folder)},
        "pictures": many(folder),
        "test": many(folder),
        "method": "linear",
        "augment": {"crop": "evaluation"},
        "loop": {
            "epochs": 12, "batch_size": 8, "learning_rate": 0.02, "weight_decay": 0.0,
            "workers": 0, "warmup_epochs": 0,
        },
    }  # fmt: skip
    return FinetuneConfig.model_validate(said | changes)


def test_a_list_says_several_classes_or_none(folder: Path) -> None:
    pictures = open_pictures(PicturesConfig.model_validate(many(folder)))
    assert class_names(pictures) == list(CLASSES)
    assert pictures[1][1].tolist() == [1, 0, 0, 1, 0]
    assert pictures[0][1].tolist() == [0] * 5


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("blue/0.png 1,x", r"bad.txt:1: a line is `relative/path class,class,\.\.\.`"),
        ("blue/0.png 1,", "bad.txt:1: a line is"),
        ("blue/0.png -", "names no classes"),
    ],
)
def test_a_line_that_is_wrong_is_named(folder: Path, line: str, message: str) -> None:
    (folder / "bad.txt").write_text(line + "\n")
    with pytest.raises(DataError, match=message):
        open_pictures(PicturesConfig.model_validate(many(folder) | {"list": "bad.txt"}))


def test_a_task_of_several_classes_is_tuned_measured_and_compared(
    folder: Path, model_folder: Path, tmp_path: Path
) -> None:
    asked = config(folder, model_folder)
    path = finetune(asked, tmp_path / "run")
    task = TaskModel.load(path)
    assert task.info.multi_label
    assert json.loads((path / "task.json").read_text())["multi_label"] is True
    tuned = task.on(load_backbone(str(model_folder)))
    assert tuned.multi_label
    ((images, truth),) = evaluation_batches(tuned, [asked.pictures])
    expected = mean_average_precision(forward(tuned.model, images), truth)
    assert task.info.training["test_map"] == pytest.approx(expected, abs=1e-4)
    assert expected > 0.7
    losses = [json.loads(each)["loss"] for each in (tmp_path / "run/metrics.jsonl").open()]
    assert sum(losses[-3:]) < sum(losses[:3])

    bank = random_bank(load_backbone(str(model_folder)), scale=0.1).save(tmp_path / "bank")
    measured = EvaluateConfig.model_validate(
        {
            "backbone": {"name": str(model_folder)}, "task": str(path), "bank": str(bank),
            "pictures": many(folder), "targets": [0, 2], "batch_size": 9, "workers": 0,
        }
    )  # fmt: skip
    found = evaluate(measured, tmp_path / "evaluation")
    rows = {row["target"]: row for row in json.loads(found.read_text())["rows"]}
    assert rows[0]["plain"]["map"] == pytest.approx(100 * expected, abs=0.01)
    at_2 = mean_average_precision(forward(tuned.model, images, 2), truth)
    assert rows[2]["plain"]["map"] == pytest.approx(100 * at_2, abs=0.01)
    assert rows[0]["plain"]["agreement"] == 100
    assert rows[2]["bank"]["kl"] > 0
    assert "top1" not in rows[2]["plain"]
    assert "| mAP % |" in found.with_suffix(".md").read_text()

    rival = CompareConfig.model_validate(
        {
            "backbone": {"name": str(model_folder)}, "task": str(path), "pictures": many(folder),
            "entries": [{"method": "tome"}], "workers": 0,
        }
    )  # fmt: skip
    with pytest.raises(ConfigError, match="several classes a picture, .* labelled=false"):
        compare_methods(rival, tmp_path / "compare")
    plain = measured.model_copy(update={"pictures": PicturesConfig(path=str(folder))})
    with pytest.raises(DataError, match="several classes a picture, and .* has labels=one"):
        evaluate(plain, tmp_path / "other")


def test_a_full_model_says_that_it_has_several_classes(
    folder: Path, model_folder: Path, pictures: Path, tmp_path: Path
) -> None:
    loop = config(folder, model_folder).loop.model_dump() | {"epochs": 1}
    path = finetune(config(folder, model_folder, method="full", loop=loop), tmp_path / "run")
    assert load_backbone(str(path)).multi_label
    with pytest.raises(ConfigError, match="several classes a picture; banks are distilled for"):
        distill(distilling(pictures, path), tmp_path / "bank")
    assert not (tmp_path / "bank").exists()
    config_json = json.loads((path / "config.json").read_text())
    config_json["multi_label"] = "yes"
    (path / "config.json").write_text(json.dumps(config_json))
    with pytest.raises(BackboneError, match="multi_label must be true or false, got 'yes'"):
        load_backbone(str(path))


def test_a_part_without_the_last_classes_is_trained_on_all(
    folder: Path, model_folder: Path
) -> None:
    job = Finetuning(load_backbone(str(model_folder)), config(folder, model_folder), 5)
    (loss,) = job.losses(torch.zeros(2, 3, 32, 32), torch.zeros(2, 3), 0)
    assert loss.isfinite()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"augment": {"mixup": 0.8}}, "mixup and cutmix are for pictures of one class"),
        ({"test": {"path": "a"}}, "give all the same labels"),
        ({"pictures": {"path": "a", "labels": "many"}}, "labels=many is for a list of pictures"),
    ],
)
def test_what_does_not_go_together_is_refused(
    folder: Path, model_folder: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValidationError, match=message):
        config(folder, model_folder, **changes)
