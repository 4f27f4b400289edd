"""Runs that are gone on with for longer than they were meant to be."""

import json
from pathlib import Path
from typing import Any

import pytest

from adapters import Bank, TaskModel
from tests.training.jobs import metrics
from tests.training.test_distill import recipe as distilling
from tests.training.test_finetune import recipe as finetuning
from tocom import ConfigError
from training.config import DistillConfig
from training.distill import distill
from training.finetune import finetune
from training.program.dry_run import dry_run
from training.run_folder import RunFolder


@pytest.fixture
def done(pictures: Path, model_folder: Path, tmp_path: Path) -> Path:
    """The folder of a distillation of four steps."""
    distill(distilling(pictures, model_folder, loop={"steps": 4}), tmp_path / "run")
    return tmp_path / "run"


def told(folder: Path) -> list[dict[str, Any]]:
    return [{**line, "seconds": 0} for line in metrics(folder)]


def test_a_run_that_is_done_goes_on_for_more_steps_and_keeps_what_it_made(
    done: Path, pictures: Path, model_folder: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    before, short = told(done), Bank.load(done / "bank").info.digest
    more = {"steps": 6, "watch_every": 2, "save_every": 5, "on_unreadable": "skip"}
    config = distilling(pictures, model_folder, loop=more)
    assert dry_run(config, done).endswith(f"{done}, gone on with after its 4 steps")
    bank = distill(config, done)
    said = capsys.readouterr().err
    assert f"what the shorter run made is now {done / 'bank-4-steps'}\n" in said
    assert "gone on with after step 4\n" in said
    assert [line["step"] for line in told(done)] == [1, 2, 3, 4, 5, 6]
    assert told(done)[:4] == before
    assert Bank.load(done / "bank-4-steps").info.digest == short
    assert Bank.load(bank).info.digest != short
    assert Bank.load(bank).info.training["samples_seen"] == 36
    # The schedule is that of a run which was so long from the first step on.
    distill(config, tmp_path / "whole")
    for ours, whole in zip(told(done)[4:], told(tmp_path / "whole")[4:], strict=True):
        assert ours["learning_rate"] == whole["learning_rate"]
        assert ours["pairs"] == whole["pairs"]
    # Given again, the same command finds it done.
    assert distill(config, done) == bank


def test_what_each_of_several_processes_tested_is_put_aside_once(
    done: Path, pictures: Path, model_folder: Path
) -> None:
    before = ["test-after-1-of-2.json", "test-after-2-of-2.json", "test-after-1-of-2-2-steps.json"]
    for name in (*before, "test-before-1-of-2.json"):
        (done / name).write_text("{}")
    distill(distilling(pictures, model_folder, loop={"steps": 6}), done)
    assert {path.name for path in done.glob("test-*")} == {
        "test-after-1-of-2-4-steps.json",
        "test-after-2-of-2-4-steps.json",
        "test-after-1-of-2-2-steps.json",
        "test-before-1-of-2.json",
    }


def test_a_longer_run_that_was_stopped_is_not_taken_for_done(
    done: Path, pictures: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = distilling(pictures, model_folder, loop={"steps": 6})
    note = RunFolder.note

    def die(self: RunFolder, line: dict[str, Any]) -> None:
        note(self, line)
        raise SystemExit("killed")

    with monkeypatch.context() as patched:
        patched.setattr(RunFolder, "note", die)
        with pytest.raises(SystemExit, match="killed"):
            distill(config, done)
    assert not (done / "bank").exists()
    distill(config, done)
    assert [line["step"] for line in told(done)] == [1, 2, 3, 4, 5, 6]
    assert Bank.load(done / "bank").info.training["samples_seen"] == 36


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loop": {"steps": 3}}, r"another recipe: loop\.steps 4 there, 3 here; choose"),
        (
            {"loop": {"steps": 6, "learning_rate": 0.002}},
            r"another recipe: loop\.learning_rate 0\.005 there, 0\.002 here; choose",
        ),
        (
            {"loop": {"steps": 4, "clip_norm": 1}, "rank": 3},
            r"rank 2 there, 3 here; loop\.clip_norm not set there, 1\.0 here",
        ),
    ],
)
def test_what_would_have_been_learned_otherwise_is_refused_with_both_values(
    done: Path, pictures: Path, model_folder: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        distill(distilling(pictures, model_folder, **changes), done)
    assert (done / "bank").exists()


def test_long_values_are_cut_short(pictures: Path, model_folder: Path, done: Path) -> None:
    many = [{"path": str(pictures), "times": 9}] * 9
    config = distilling(pictures, model_folder, loop={"steps": 4})
    config = DistillConfig.model_validate(config.model_dump() | {"pictures": many})
    with pytest.raises(ConfigError, match=r"pictures \[\{.{55}\.\.\. there, \[\{.{55}\.\.\. here;"):
        distill(config, done)


def test_a_run_whose_checkpoints_are_gone_does_not_begin_anew(
    done: Path, pictures: Path, model_folder: Path
) -> None:
    (done / "checkpoints").rename(done / "elsewhere")
    with pytest.raises(ConfigError, match="run has no checkpoint to go on from"):
        distill(distilling(pictures, model_folder, loop={"steps": 6}), done)
    assert (done / "bank").exists()


def test_a_fine_tuning_goes_on_for_more_epochs_with_its_search(
    pictures: Path, model_folder: Path, tmp_path: Path
) -> None:
    search = {"key": "loop.learning_rate", "values": [1e-9, 3e-3], "share": 0.25}

    def run(epochs: float) -> Path:
        loop = {"epochs": epochs, "batch_size": 12, "learning_rate": 3e-3, "workers": 0}
        config = finetuning(pictures, model_folder, method="linear", search=search, loop=loop)
        return finetune(config, tmp_path / "run")

    run(1.5)
    task = TaskModel.load(run(3)).info.training
    assert task["recipe"]["loop"]["epochs"] == 3
    assert "test_accuracy" in task
    assert (tmp_path / "run" / "task-1.5-epochs" / "task.json").exists()
    tried = tmp_path / "run" / "search" / "loop.learning_rate=0.003"
    assert json.loads((tried / "result-1.5-epochs.json").read_text())["value"] == 3e-3
    assert json.loads((tried / "result.json").read_text())["value"] == 3e-3
    assert [line["step"] for line in told(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]
