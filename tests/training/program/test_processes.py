"""Two processes under torchrun make what one makes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from adapters import Bank, TaskModel
from tests.training.jobs import environment, metrics
from tests.training.test_loop import RECIPE
from training.cli import main

#: Runs several commands, because each new process takes longer to begin than they take.
PROGRAM = """
import json, sys
from training.cli import main
for command in json.loads(sys.argv[1]):
    assert main(command) == 0
"""
LADDER = {
    "format_version": 1,
    "name": "learned",
    "method": {"name": "atme", "options": {"linear": True}},
    "patches": 16,
    "rungs": [[0, 0], [0, 1], [1, 1]],
}


@pytest.fixture(scope="module")
def commands(
    pictures: Path, model_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, list[str]]:
    """What is run, without its folder; `finetune` learns a method of reduction, too."""
    folder = tmp_path_factory.mktemp("recipes")
    (folder / "tiny.toml").write_text(RECIPE.format(pictures=pictures, backbone=model_folder))
    (folder / "ladder.json").write_text(json.dumps(LADDER))
    given = [f"backbone.name={model_folder}", f"pictures.path={pictures}"]
    return {
        "distill": [str(folder / "tiny.toml"), "unseen=5", "loop.watch_every=3"],
        "finetune": [
            "deit-tiny-task", *given, f"test.path={pictures}", "method=linear", "loop.epochs=2",
            "loop.batch_size=12", "loop.learning_rate=3e-3", f"ladder={folder}/ladder.json",
            "source=2",
        ],
        "evaluate": [
            "every-rate", *given, "batch_size=7", "workers=0", "limit=23", "sources=[0,3]",
            "max_rate=4",
        ],
    }  # fmt: skip


@pytest.fixture(scope="module")
def two(commands: dict[str, list[str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the folders that two processes made."""
    folder = tmp_path_factory.mktemp("two")
    program = folder / "program.py"
    program.write_text(PROGRAM)
    asked = [[name, *words, "--folder", f"{folder}/{name}"] for name, words in commands.items()]
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
        str(program), json.dumps(asked),
    ]  # fmt: skip
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


def alone(commands: dict[str, list[str]], name: str, folder: Path, *more: str) -> Path:
    """The folder that one process makes."""
    assert main([name, *commands[name], *more, "--folder", str(folder)]) == 0
    return folder


def test_they_make_the_bank_of_one_that_accumulates(
    commands: dict[str, list[str]], two: Path, tmp_path: Path
) -> None:
    one = alone(commands, "distill", tmp_path, "loop.accumulation=2")
    watched = 0
    for single, shared in zip(metrics(one), metrics(two / "distill"), strict=True):
        assert single["pairs"] == shared["pairs"]
        assert single["loss"] == pytest.approx(shared["loss"], abs=1e-7)
        assert single.keys() == shared.keys()
        unseen = [key for key in single if key.startswith("unseen")]
        watched += len(unseen)
        for key in unseen:
            assert single[key] == pytest.approx(shared[key], abs=1e-7)
    assert watched == 2 * 2 * 4  # two watches of four rates, with and without the bank
    first, second = Bank.load(one / "bank"), Bank.load(two / "distill" / "bank")
    for name, tensor in first.tensors.items():
        torch.testing.assert_close(tensor, second.tensors[name], rtol=1e-3, atol=1e-5)


def test_they_learn_together_and_share_out_the_test(
    commands: dict[str, list[str]], two: Path, tmp_path: Path
) -> None:
    one = TaskModel.load(alone(commands, "finetune", tmp_path, "loop.accumulation=2") / "task")
    other = TaskModel.load(two / "finetune" / "task")
    for name, tensor in one.tensors.items():
        torch.testing.assert_close(other.tensors[name], tensor, rtol=0, atol=2e-3)
    assert other.info.training["test_accuracy"] == one.info.training["test_accuracy"]


def test_they_share_out_the_pictures_that_are_measured(
    commands: dict[str, list[str]], two: Path, tmp_path: Path
) -> None:
    one = json.loads((alone(commands, "evaluate", tmp_path) / "evaluation.json").read_text())
    other = json.loads((two / "evaluate" / "evaluation.json").read_text())
    rows = one.pop("rows"), other.pop("rows")
    assert one == other
    for single, shared in zip(*rows, strict=True):
        assert single.pop("plain") == pytest.approx(shared.pop("plain"), abs=1e-4)
        assert single == shared
    parts = [
        json.loads((two / "evaluate" / f"progress-{number}-of-2.json").read_text())["done"]
        for number in (1, 2)
    ]
    assert parts == [12, 11]
