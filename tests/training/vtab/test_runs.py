import json
import os
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from tests.training.banks import random_bank
from tests.training.lists import write_lists
from tocom import ConfigError, DataError, load_backbone
from training.vtab import runs as module
from training.vtab import tasks
from training.vtab.config import VtabConfig
from training.vtab.runs import check, report, vtab
from training.vtab.table import table
from training.vtab.tasks import Task

COLOURS = {"name": "Colours", "folder": "colours", "group": "Natural", "classes": 3}
CHANGES = (
    "adaptformer.bottleneck=4",
    "search.values=[0.1, 1.0]",
    "loop.epochs=1",
    "loop.batch_size=6",
    "loop.learning_rate=0.01",
    "loop.workers=0",
)


@pytest.fixture
def root(pictures: Path, tmp_path: Path) -> Path:
    write_lists(tmp_path / "data", "colours", pictures)
    return write_lists(tmp_path / "data", "shades", pictures)


def recipe(root: Path, model_folder: Path, **changes: Any) -> VtabConfig:
    values: dict[str, Any] = {
        "root": str(root),
        "tasks": [COLOURS, COLOURS | {"name": "Shades", "folder": "shades", "group": "Structured"}],
        "sources": [0, 2],
        "targets": [0, 3],
        "changes": [f"backbone.name={json.dumps(str(model_folder))}", *CHANGES],
    }
    return VtabConfig.model_validate(values | changes)


def test_all_runs_make_a_table_and_are_not_done_twice(
    root: Path, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bank = random_bank(load_backbone(str(model_folder))).save(tmp_path / "bank")
    config = recipe(root, model_folder, bank=str(bank))
    path = vtab(config, tmp_path / "runs")
    text = path.read_text()
    assert "| source | rate | Colours | Shades | Natural | Structured | mean of groups |" in text
    lines = [line for line in text.splitlines() if line.startswith(("| 0", "| 2"))]
    assert [line.split("|")[1:3] for line in lines] == [
        [" 0 ", " 0 "], [" 0 ", " 3 "], [" 2 ", " 0 "], [" 2 ", " 3 "],
    ]  # fmt: skip
    assert " / " in lines[1]  # with the bank
    assert " / " not in lines[0]  # there is no delta
    said = json.loads((tmp_path / "runs" / "vtab.json").read_text())
    assert len(said["rows"]) == 8

    def cell(rows: list[dict[str, Any]]) -> list[float]:
        found = (row for row in rows if (row["source"], row["target"]) == (2, 3))
        return [row["plain"]["top1"] for row in found]

    assert cell(said["mean"]) == [pytest.approx(sum(cell(said["rows"])) / 2)]
    assert (tmp_path / "runs" / "matrix.png").exists()
    monkeypatch.setattr("training.loop.run", lambda *_: pytest.fail("trained again"))
    assert vtab(config, tmp_path / "runs").read_text() == text


def test_processes_make_the_same_table(root: Path, model_folder: Path, tmp_path: Path) -> None:
    config = recipe(root, model_folder, sources=[1])
    one = vtab(config, tmp_path / "one").read_text()
    two = vtab(config.model_copy(update={"jobs": 2}), tmp_path / "two").read_text()
    assert one == two


@pytest.mark.parametrize(
    ("mask", "visible", "given"),
    [
        ("6,7", 2, ["6", "7", "6"]),
        ("GPU-8932f937, GPU-46f8b33e", 2, ["GPU-8932f937", "GPU-46f8b33e", "GPU-8932f937"]),
        ("MIG-1b2c,MIG-5d6e", 1, ["MIG-1b2c", "MIG-5d6e", "MIG-1b2c"]),
        ("3,99", 1, ["3", "3", "3"]),  # there is no 99
        ("", 0, ["", "", ""]),
        (None, 2, ["0", "1", "0"]),
        (None, 0, [None, None, None]),
    ],
)
def test_each_process_has_one_of_the_gpus_that_are_allowed(
    root: Path, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    mask: str | None, visible: int, given: list[str | None],
) -> None:  # fmt: skip
    seen = []

    def start_all(jobs: int, *_: Any, initializer: Any, initargs: Any) -> Any:
        for _ in range(jobs):
            with monkeypatch.context() as process:
                process.setattr("torch.set_num_threads", lambda _: None)
                process.setattr(os, "environ", dict(os.environ))
                initializer(*initargs)
                seen.append(os.environ.get("CUDA_VISIBLE_DEVICES"))
        return nullcontext()

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if mask is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", mask)
    monkeypatch.setattr("torch.cuda.device_count", lambda: visible)
    monkeypatch.setattr(module, "ProcessPoolExecutor", start_all)
    module._share_out(recipe(root, model_folder, jobs=3), [], tmp_path)
    assert seen == given


def test_groups_count_alike() -> None:
    chosen = [Task(name, name, group, 2) for name, group in
              (("a", "Natural"), ("b", "Natural"), ("c", "Structured"))]  # fmt: skip
    rows = [
        {"task": name, "source": 0, "target": 8, "seed": 0,
         "plain": {"top1": top1}, "bank": {"top1": top1 + 1}}
        for name, top1 in (("a", 50.0), ("b", 70.0), ("c", 20.0))
    ]  # fmt: skip
    line = table(rows, chosen).splitlines()[-1]
    assert line == (
        "| 0 | 8 | 50.0 / 51.0 | 70.0 / 71.0 | 20.0 / 21.0 | 60.0 / 61.0 | 20.0 / 21.0 "
        "| 40.0 / 41.0 |"
    )


def test_vtabs_table_is_the_papers() -> None:
    groups = [task.group for task in tasks.VTAB]
    assert [groups.count(group) for group in ("Natural", "Specialized", "Structured")] == [7, 4, 8]
    assert len({task.folder for task in tasks.VTAB}) == 19
    assert all(task.train == 1000 for task in tasks.VTAB)


@pytest.mark.parametrize(
    ("file", "text", "problem"),
    [
        ("val200.txt", None, "val200.txt cannot be read"),
        ("val200.txt", "images/red/4.png 2\n", "is not train800.txt and val200.txt together"),
        ("train800val200.txt", "images/red/0.png 3\n", "has the class 3; there are 3, from 0"),
        ("train800val200.txt", "images/red/0.png 2\n", "has no picture of the class 0"),
        ("test.txt", "images/red/0.png 2\n", "images/red/0.png is trained on and tested on"),
        ("test.txt", "images/red/9.png 2\n", "names images/red/9.png, which is not in"),
    ],
)
def test_faulty_data_is_told_first(
    root: Path, model_folder: Path, tmp_path: Path, file: str, text: str | None, problem: str
) -> None:
    path = root / "colours" / file
    if text is None:
        path.unlink()
    else:
        path.write_text(text)
    with pytest.raises(DataError, match=problem):
        vtab(recipe(root, model_folder), tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_data_that_is_missing_is_listed(root: Path, model_folder: Path) -> None:
    config = recipe(root, model_folder, tasks=[COLOURS, "cifar", "kitti"])
    with pytest.raises(DataError, match=r"(?s)no folder .*cifar.*no folder .*kitti"):
        check(config)
    assert check(recipe(root, model_folder)).endswith("2 tasks are complete")


def test_an_unknown_task_names_those_there_are(root: Path, model_folder: Path) -> None:
    config = recipe(root, model_folder, tasks=["mnist"])
    with pytest.raises(ConfigError, match="no task 'mnist'; it has: cifar, caltech101"):
        check(config)


def test_there_is_no_table_of_nothing(root: Path, model_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no finished run"):
        report(recipe(root, model_folder), tmp_path)
