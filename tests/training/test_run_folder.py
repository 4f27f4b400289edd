"""What a crash, a full disk or a damaged file leaves of a run."""

import errno
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training.jobs import Brightness, metrics, run_job
from tocom import ConfigError
from training.loop_config import LoopConfig
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


def test_a_run_of_an_older_version_goes_on_with_the_defaults_of_what_is_new(
    run: Run, tmp_path: Path
) -> None:
    whole = run(tmp_path)
    recipe = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(
        json.dumps({key: value for key, value in recipe.items() if key != "time_limit"})
    )
    with pytest.raises(ConfigError, match=r"another recipe: time_limit not set there, 1.0 here"):
        run(tmp_path, time_limit=1)
    assert torch.equal(run(tmp_path), whole)
    assert json.loads((tmp_path / "config.json").read_text()) == recipe


def test_a_run_whose_time_is_up_saves_and_goes_on_with_the_same_command(
    run: Run, pictures: Path, model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = LoopConfig(
        steps=4, batch_size=6, learning_rate=0.1, workers=0, save_every=100, time_limit=2.5
    )

    class Slow(Brightness):
        """A step takes a minute."""

        minutes = 0

        def losses(self, *arguments: Any) -> Iterator[torch.Tensor]:
            self.minutes += 1
            return super().losses(*arguments)

    def train(folder: Path) -> Any:
        job = Slow()
        run_job(job, config, pictures, model_folder, folder, lambda: 60.0 * job.minutes)
        return job.module.weight

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "short")
    assert "Stopped after step 3. The same command resumes" in capsys.readouterr().err
    assert [path.name for path in tmp_path.glob("short/checkpoints/*")] == ["step-000003"]
    assert torch.equal(train(tmp_path / "short"), run(tmp_path / "whole"))
    assert steps(tmp_path / "short") == [1, 2, 3, 4]


def test_a_recipe_that_could_not_be_followed_leaves_its_folder_free(
    run: Run, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text('{"steps": 7}')
    run(tmp_path)
    with pytest.raises(ConfigError, match="another recipe"):
        run(tmp_path, weight_decay=0.5)


class Tracked:
    """What stands in for the package wandb."""

    def __init__(self) -> None:
        self.__spec__ = ModuleSpec("wandb", None)
        self.opened: list[dict[str, Any]] = []
        self.logged: list[tuple[int, float]] = []
        self.finished = 0

    def init(self, **options: Any) -> "Tracked":
        self.opened.append(options)
        return self

    def log(self, values: dict[str, float], step: int) -> None:
        self.logged.append((step, values["loss"]))

    def finish(self) -> None:
        self.finished += 1


def test_weights_and_biases_gets_the_figures_and_a_resumed_run_goes_on_there(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = Tracked()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    run(tmp_path / "mine", wandb=True)
    assert wandb.logged == [(line["step"], line["loss"]) for line in metrics(tmp_path / "mine")]
    run(tmp_path / "mine", wandb=True)
    run(tmp_path / "other", wandb=True)
    first, again, other = wandb.opened
    assert wandb.finished == 3
    assert first == again
    assert first["id"] != other["id"]
    assert (first["project"], first["name"], first["resume"]) == ("tocom", "mine", "allow")
    assert first["config"]["steps"] == 4


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_tracker_that_is_not_installed_is_told_first(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda package: None)
    with pytest.raises(ConfigError, match=rf"loop\.{name} needs .*: pip install {name}"):
        run(tmp_path / "run", **{name: True})
    assert not (tmp_path / "run").exists()


def test_a_deterministic_run_is_torch_s_own(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    plain = run(tmp_path / "plain")
    assert not torch.are_deterministic_algorithms_enabled()
    try:
        assert torch.equal(run(tmp_path / "exact", deterministic=True), plain)
        assert torch.are_deterministic_algorithms_enabled()
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_run_does_not_go_on_with_another_number_of_pictures(
    run: Run, pictures: Path, model_folder: Path, tmp_path: Path
) -> None:
    run(tmp_path)
    config = LoopConfig(steps=4, batch_size=6, learning_rate=0.1, workers=0, save_every=1)
    fewer = pictures.parent / "blue"
    message = "was begun with 24 pictures an epoch; there are 8 now; choose another run folder"
    with pytest.raises(ConfigError, match=message):
        run_job(Brightness(), config, fewer, model_folder, tmp_path)
    for checkpoint in tmp_path.glob("checkpoints/*/pictures-an-epoch"):
        checkpoint.unlink()  # as an older version left them
    run_job(Brightness(), config, fewer, model_folder, tmp_path)
