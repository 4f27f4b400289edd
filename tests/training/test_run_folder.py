"""What a crash, a full disk or a damaged file leaves of a run."""

import errno
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training.jobs import Brightness, metrics, run_job
from training.config import LoopConfig
from training.run_folder import TrainingError

Run = Callable[..., torch.Tensor]


@pytest.fixture
def run(pictures: Path, model_folder: Path) -> Run:
    """Run four steps in a folder, or go on with them, and return the weights."""

    def run(folder: Path, **changes: Any) -> torch.Tensor:
        config = LoopConfig(
            steps=4, batch_size=6, learning_rate=0.1, workers=0, save_every=1, **changes
        )
        job = Brightness()
        run_job(job, config, pictures, model_folder, folder)
        assert isinstance(job.module, torch.nn.Linear)
        return job.module.weight.detach()

    return run


def steps(folder: Path) -> list[int]:
    return [line["step"] for line in metrics(folder)]


@pytest.mark.parametrize("torn", ['{"step": 4, "lo', '{"step": 4, "pairs": {}', "\0\0\0"])
def test_a_line_that_a_crash_cut_off_does_not_count(run: Run, tmp_path: Path, torn: str) -> None:
    whole = run(tmp_path)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(torn)
    assert torch.equal(run(tmp_path), whole)
    assert steps(tmp_path) == [1, 2, 3, 4]


def test_a_line_that_a_full_disk_cut_off_takes_no_other_along(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_file = Path.open

    def full_at_the_second_line(self: Path, *arguments: Any, **options: Any) -> Any:
        file = open_file(self, *arguments, **options)
        if self.name == "metrics.jsonl" and arguments == ("a",) and file.tell():
            file.write('{"step": 2, "lo')
            file.close()
            monkeypatch.setattr(Path, "open", open_file)
            raise OSError(errno.ENOSPC, "No space left on device")
        return file

    monkeypatch.setattr(Path, "open", full_at_the_second_line)
    whole = run(tmp_path, on_full_disk="skip")
    text = (tmp_path / "metrics.jsonl").read_text()
    assert [line[:10] for line in text.splitlines()] == [f'{{"step": {i}' for i in range(1, 5)]
    assert torch.equal(run(tmp_path, on_full_disk="skip"), whole)
    assert steps(tmp_path) == [1, 3, 4]


def damage(file: Path, how: str) -> None:
    if how == "cut":
        file.write_bytes(file.read_bytes()[:-20])
    elif how == "empty":
        file.write_bytes(b"")
    else:
        file.unlink()


@pytest.mark.parametrize("how", ["cut", "empty", "missing"])
@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.bin"])
def test_an_older_checkpoint_is_gone_on_from_where_the_newest_is_damaged(
    run: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, how: str
) -> None:
    whole = run(tmp_path)
    file = tmp_path / "checkpoints" / "step-000004" / name
    content = file.read_bytes()
    damage(file, how)
    with caplog.at_level(logging.WARNING):
        assert torch.equal(run(tmp_path), whole)
    assert "step-000004 cannot be read" in caplog.text
    assert "going on from step-000003" in caplog.text
    assert steps(tmp_path) == [1, 2, 3, 4]
    assert len(file.read_bytes()) == len(content)  # written anew


def test_a_run_does_not_begin_anew_by_itself(run: Run, tmp_path: Path) -> None:
    run(tmp_path)
    for file in tmp_path.glob("checkpoints/*/model.safetensors"):
        damage(file, "cut")
    with pytest.raises(TrainingError, match="step-000004 cannot be read .*no older one that can"):
        run(tmp_path)
    assert steps(tmp_path) == [1, 2, 3, 4]


def test_a_checkpoint_is_on_the_disk_before_it_has_its_name(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[Path] = []
    monkeypatch.setattr("adapters.durable.sync", synced.append)
    rename = Path.rename

    def named(self: Path, target: Path) -> Path:
        if target.name.startswith("step-"):
            assert {*self.iterdir(), self} <= {*synced}
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", named)
    run(tmp_path)
    assert tmp_path / "checkpoints" in synced


def test_what_a_killed_run_was_about_to_write_is_removed(run: Run, tmp_path: Path) -> None:
    run(tmp_path)
    (tmp_path / "checkpoints" / ".step-000005.0123abcd").mkdir()
    (tmp_path / ".model.0123abcd").mkdir()
    (tmp_path / ".config.json.0123abcd").write_text("{")
    (tmp_path / ".gitignore").write_text("*")
    run(tmp_path)
    names = [path.name for path in sorted((tmp_path / "checkpoints").iterdir())]
    assert names == ["step-000003", "step-000004"]
    assert [path.name for path in tmp_path.glob(".*")] == [".gitignore"]
