"""Tasks in folders, and with validation sets of their own."""

import json
import tarfile
from pathlib import Path
from typing import Any

import pytest

from tests.training.vtab.recipes import CHANGES, COLOURS, recipe
from tocom import DataError
from training.presets import read_recipe
from training.vtab import runs as module
from training.vtab.config import VtabConfig
from training.vtab.runs import Run, check, chosen_tasks, vtab


@pytest.fixture
def folders(pictures: Path, tmp_path: Path) -> Path:
    """The three colours in folders train, val and test of class folders."""
    with tarfile.open(pictures) as tar:
        tar.extractall(tmp_path / "all", filter="data")
    parts = {"train": range(4), "val": range(4, 6), "test": range(6, 8)}
    for part, numbers in parts.items():
        for colour in ("blue", "green", "red"):
            folder = tmp_path / "data" / "hues" / part / colour
            folder.mkdir(parents=True)
            for i in numbers:
                (tmp_path / "all" / colour / f"{i}.png").rename(folder / f"{i}.png")
    return tmp_path / "data"


HUES = {
    "name": "Hues", "folder": "hues", "group": "FGVC", "classes": 3, "pictures": "train",
    "test": "test", "train_count": 12, "test_count": 6,
}  # fmt: skip
OFFICIAL = {"train": "train", "validation": "val"}


@pytest.mark.parametrize("official", [True, False])
def test_a_task_may_have_folders_and_an_official_validation_set(
    folders: Path, model_folder: Path, tmp_path: Path, official: bool
) -> None:
    task = HUES | (OFFICIAL if official else {})
    changes = [f"backbone.name={json.dumps(str(model_folder))}", *CHANGES[3:], "method=linear",
               "search.values=[0.01, 0.02]", "search.share=0.25"]  # fmt: skip
    config = recipe(folders, model_folder, tasks=[task], sources=[1], recipe="fgvc-full",
                    changes=[*changes, "loop.epochs=1", "loop.precision=no"])  # fmt: skip
    assert check(config).endswith("1 tasks are complete")
    (chosen,) = chosen_tasks(config)
    made = module._recipe(config, Run(chosen, 1, 0))
    assert (made.pictures.path, made.pictures.list) == (str(folders / "hues" / "train"), None)
    assert made.test.path == str(folders / "hues" / "test")
    assert made.search is not None
    validation = made.search.validation
    assert (validation and validation.path) == (str(folders / "hues/val") if official else None)
    text = vtab(config, tmp_path / "runs").read_text()
    assert "| source | rate | Hues | FGVC | mean of groups |" in text
    said = json.loads((tmp_path / "runs/hues/source-1/seed-0/task/task.json").read_text())
    assert said["training"]["pictures"] == 12


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"classes": 4}, r"Hues: train has 3 classes, not 4\n.*test has 3 classes, not 4"),
        ({"train_count": 13}, "Hues: train has 12 pictures, not 13"),
        ({"test_count": 7}, "Hues: test has 6 pictures, not 7"),
        (OFFICIAL | {"validation": "valid"}, "Hues: there are no pictures at .*hues/valid"),
        ({"pictures": "all.txt"}, r"all\.txt cannot be read"),
    ],
)
def test_what_is_wrong_with_folders_is_told(
    folders: Path, model_folder: Path, changes: dict[str, Any], problem: str
) -> None:
    with pytest.raises(DataError, match=f"(?s){problem}"):
        check(recipe(folders, model_folder, tasks=[HUES | changes]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pictures": "train"}, "'Colours' has both pictures and test, or neither"),
        ({"train": "train"}, "'Colours' has both train and validation, or neither"),
        (OFFICIAL, "'Colours' has train and validation, but no pictures"),
    ],
)
def test_half_a_layout_is_refused(
    tmp_path: Path, model_folder: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        recipe(tmp_path, model_folder, tasks=[COLOURS | changes])


def test_the_presets_have_the_papers_data_sets() -> None:
    found = {
        task.name: (task.classes, task.train, task.test, task.parts.validation)
        for preset in ("cifar100", "fgvc")
        for task in chosen_tasks(read_recipe(VtabConfig, preset, ["root=data"]))
    }
    assert found == {
        "CIFAR-100": (100, 50_000, 10_000, None),
        "CUB-200": (200, 5_994, 5_794, None),
        "Stanford Cars": (196, 8_144, 8_041, None),
        "Flowers102": (102, 1_020, 6_149, "val"),
        "Stanford Dogs": (120, 12_000, 8_580, None),
    }
