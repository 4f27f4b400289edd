import json
import os
from concurrent.futures import Future
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from tests.training.banks import random_bank
from tests.training.vtab.lists import write_lists
from tests.training.vtab.recipes import CHANGES, COLOURS, recipe
from tocom import BankError, ConfigError, DataError, RateError, load_backbone
from training.measuring_config import EvaluateConfig
from training.program.dry_run import dry_run
from training.vtab import runs as module
from training.vtab import tasks
from training.vtab.config import VtabConfig
from training.vtab.runs import Run, check, chosen_tasks, report, vtab
from training.vtab.table import table
from training.vtab.tasks import Task


@pytest.fixture
def root(pictures: Path, tmp_path: Path) -> Path:
    write_lists(tmp_path / "data", "colours", pictures)
    return write_lists(tmp_path / "data", "shades", pictures)


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


def test_longer_runs_go_on_and_what_was_measured_of_the_shorter_ones_is_kept(
    root: Path, model_folder: Path, tmp_path: Path
) -> None:
    changes = [each for each in CHANGES if not each.startswith("search")]
    changes = [f"backbone.name={json.dumps(str(model_folder))}", "search.values=[]", *changes]
    config = recipe(root, model_folder, tasks=[COLOURS], sources=[2], changes=changes)
    vtab(config, tmp_path / "runs")
    own = Run(chosen_tasks(config)[0], 2, 0).folder(tmp_path / "runs")
    short = (own / "evaluation" / "evaluation.json").read_text()
    longer = config.model_copy(update={"changes": (*changes, "loop.epochs=2")})
    vtab(longer, tmp_path / "runs")
    assert (own / "evaluation-1-epochs" / "evaluation.json").read_text() == short
    now = json.loads((own / "evaluation" / "evaluation.json").read_text())
    assert now["task_digest"] != json.loads(short)["task_digest"]
    written = json.loads((tmp_path / "runs" / "vtab.json").read_text())["rows"]
    assert [row["plain"] for row in written] == [row["plain"] for row in now["rows"]]
    with pytest.raises(ConfigError, match=r"another recipe: loop\.epochs 2(\.0)? there, 1"):
        vtab(config, tmp_path / "runs")


def test_what_was_measured_otherwise_is_kept_and_the_models_stay(
    root: Path, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bank = random_bank(load_backbone(str(model_folder)), 1.0).save(tmp_path / "bank")
    changes = [each for each in CHANGES if not each.startswith("search")]
    changes = [f"backbone.name={json.dumps(str(model_folder))}", "search.values=[]", *changes]
    config = recipe(
        root, model_folder, tasks=[COLOURS], sources=[2], changes=changes, bank=str(bank),
        multipliers=[0.01],
    )  # fmt: skip
    vtab(config, tmp_path / "runs")
    own = Run(chosen_tasks(config)[0], 2, 0).folder(tmp_path / "runs")
    before = {name: files_of(own / name) for name in ("evaluation", "calibration")}
    monkeypatch.setattr("training.loop.run", lambda *_: pytest.fail("trained again"))
    other = config.model_copy(update={"targets": (2, 4), "limit": 3})
    vtab(other, tmp_path / "runs")
    for name, files in before.items():
        assert files_of(own / f"{name}-other-1") == files
    rows = json.loads((tmp_path / "runs" / "vtab.json").read_text())["rows"]
    assert [(row["target"], row["pictures"], "searched" in row) for row in rows] == [
        (2, 3, False), (4, 3, True),
    ]  # fmt: skip
    vtab(other.model_copy(update={"multipliers": ()}), tmp_path / "runs")
    rows = json.loads((tmp_path / "runs" / "vtab.json").read_text())["rows"]
    assert not any("searched" in row for row in rows)
    assert {path.name for path in own.iterdir() if path.is_dir()} >= {
        "evaluation", "evaluation-other-1", "evaluation-other-2", "calibration-other-2",
    }  # fmt: skip


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_processes_make_the_same_table(root: Path, model_folder: Path, tmp_path: Path) -> None:
    config = recipe(root, model_folder, sources=[1])
    one = vtab(config, tmp_path / "one").read_text()
    two = vtab(config.model_copy(update={"jobs": 2}), tmp_path / "two").read_text()
    assert one == two


@pytest.mark.parametrize("error", [DataError, KeyboardInterrupt])
def test_one_run_that_fails_stops_all_others(
    root: Path, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    error: type[BaseException],
) -> None:  # fmt: skip
    stopped: list[Any] = []

    class Pool(nullcontext[Any]):
        def __init__(self, *_: Any, **__: Any) -> None:
            super().__init__(self)

        def submit(self, _: Any, __: VtabConfig, run: Run, ___: Path) -> Future[None]:
            future: Future[None] = Future()
            if run.source == 2:
                future.set_exception(error("is faulty"))
            return future  # the others are never done

        def shutdown(self, wait: bool, cancel_futures: bool) -> None:
            stopped.append((wait, cancel_futures))

    class Process:
        def terminate(self) -> None:
            stopped.append(self)

    running = Process()
    monkeypatch.setattr(module, "ProcessPoolExecutor", Pool)
    monkeypatch.setattr(module.multiprocessing, "active_children", lambda: [running])
    with pytest.raises(error, match="is faulty"):
        vtab(recipe(root, model_folder, jobs=2), tmp_path / "runs")
    assert stopped == [(False, True), running]


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


# Multipliers of the bank's deltas


def test_a_multiplier_is_searched_for_each_model_and_measured_beside_the_banks_own(
    root: Path, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bank = random_bank(load_backbone(str(model_folder)), 1.0).save(tmp_path / "bank")
    config = recipe(
        root, model_folder, bank=str(bank), tasks=[COLOURS], sources=[2], multipliers=[0.01, 30.0]
    )
    text = vtab(config, tmp_path / "runs").read_text()
    own = tmp_path / "runs" / "colours" / "source-2" / "seed-0"
    found = json.loads((own / "calibration" / "calibration.json").read_text())
    assert (found["pictures"]["count"], found["measure"]) == (18, "kl")  # not those of the test
    assert {row["multiplier"] for row in found["tried"]} == {0.01, 1.0, 30.0}
    searched = found["multiplier"]
    assert searched == 0.01  # a random bank repairs nothing
    rows = json.loads((tmp_path / "runs" / "vtab.json").read_text())["rows"]
    assert all(row["multiplier"] == 1.0 for row in rows)
    result = json.loads((own / "evaluation-searched" / "evaluation.json").read_text())
    for row, other in zip(rows, result["rows"], strict=True):
        assert other["multiplier"] == 0.01
        assert row["searched"] == {"multiplier": 0.01, **other["bank"]}
        assert row["searched"]["kl"] != row["bank"]["kl"]
    assert "plain merging / with the bank / with the multiplier that was searched" in text
    assert "the bank's own is 1.\n\n| source | Colours |\n|---|---|\n| 2 | 0.01 |" in text
    line = next(line for line in text.splitlines() if line.startswith("| 2 | 3 |"))
    assert line.count(" / ") == 2 * 3  # of the task, its group and the mean
    monkeypatch.setattr("training.loop.run", lambda *_: pytest.fail("trained again"))
    assert vtab(config, tmp_path / "runs").read_text() == text


def test_a_bank_whose_own_multiplier_is_the_best_is_measured_once(
    root: Path, model_folder: Path, tmp_path: Path
) -> None:
    bank = random_bank(load_backbone(str(model_folder)), 0.01).save(tmp_path / "bank")
    config = recipe(
        root, model_folder, bank=str(bank), tasks=[COLOURS], sources=[0], multipliers=[30.0]
    )
    vtab(config, tmp_path / "runs")
    assert not list((tmp_path / "runs").rglob("evaluation-searched"))
    rows = json.loads((tmp_path / "runs" / "vtab.json").read_text())["rows"]
    (row,) = (row for row in rows if row["target"] == 3)
    assert row["searched"] == {"multiplier": 0.01, **row["bank"]}


def test_without_a_bank_there_is_nothing_to_multiply(root: Path, model_folder: Path) -> None:
    with pytest.raises(ValueError, match="a multiplier is of a bank's deltas: give a bank, too"):
        EvaluateConfig.model_validate(
            {"backbone": {"name": "x"}, "pictures": {"path": "y"}, "multiplier": 0.1}
        )


def test_a_bank_for_the_other_attention_is_told_first(
    root: Path, model_folder: Path, tmp_path: Path
) -> None:
    bank = random_bank(load_backbone(str(model_folder))).save(tmp_path / "bank")
    config = recipe(root, model_folder, bank=str(bank), proportional=False)
    with pytest.raises(ConfigError, match="is for proportional=True, the fine-tuning for False"):
        vtab(config, tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"targets": [0, 5]}, ConfigError, "'random' has the rates 0 to 4, got 5"),
        ({"sources": [0, 9]}, ConfigError, "'random' has the rates 0 to 4, got 9"),
        (
            {"sources": [0], "ladder": {"method": "topk", "steps": 4}},
            ConfigError,
            "'random' is for the ladder 'tome', the fine-tuning for 'topk'",
        ),
        (
            {"sources": [0, 2], "changes": [*CHANGES, 'ladder={method="topk", steps=4}']},
            ConfigError,
            "'random' is for the ladder 'tome', the fine-tuning for 'topk'",
        ),
        (
            {"changes": [*CHANGES, "backbone.name=bundled:deit_tiny"]},
            BankError,
            "'random' is for .* and does not fit",
        ),
    ],
)
def test_a_bank_that_does_not_fit_is_told_first(
    root: Path, model_folder: Path, tmp_path: Path, changes: dict[str, Any],
    error: type[Exception], message: str,
) -> None:  # fmt: skip
    bank = random_bank(load_backbone(str(model_folder))).save(tmp_path / "bank")
    own = f"backbone.name={json.dumps(str(model_folder))}"
    changes = changes | {"changes": [own, *changes.get("changes", CHANGES)]}
    config = recipe(root, model_folder, bank=str(bank), **changes)
    for run in (vtab, dry_run):
        with pytest.raises(error, match=message):
            run(config, tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"targets": [0, 9]}, RateError, "rates of the ladder 'topk' are 0 to 4, got 9"),
        ({"sources": [1, 9]}, RateError, "rates of the ladder 'topk' are 0 to 4, got 9"),
        (
            {"sources": [2, 0], "ladder": {"method": "sit", "steps": 4}},
            ConfigError,
            "'sit' learns nothing at rate 0",
        ),
    ],
)
def test_a_rate_that_there_is_not_is_told_first(
    root: Path, model_folder: Path, tmp_path: Path, changes: dict[str, Any],
    error: type[Exception], message: str,
) -> None:  # fmt: skip
    rungs = {"ladder": {"method": "topk", "steps": 4}}
    config = recipe(root, model_folder, **(rungs | changes))
    for run in (vtab, dry_run):
        with pytest.raises(error, match=message):
            run(config, tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("folder", "name"),
    [("flowers/v2", "flowers-v2"), ("2024", "2024"), ("_A b", "a-b"), ("Ü", "task")],
)
def test_a_run_is_named_by_its_folder(
    root: Path, model_folder: Path, folder: str, name: str
) -> None:
    config = recipe(root, model_folder, tasks=[COLOURS | {"folder": folder}])
    assert module._recipe(config, Run(chosen_tasks(config)[0], 0, 0)).name == name


def test_seeds_are_not_negative(root: Path, model_folder: Path) -> None:
    with pytest.raises(ValueError, match="greater than or equal to 0"):
        recipe(root, model_folder, seeds=[0, -1])
