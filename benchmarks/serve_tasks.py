"""What tasks cost that share a backbone: memory of a server's models, 1 to 64 tasks.

    python -m benchmarks.serve_tasks

Each number of tasks has a process of its own, which loads the backbone and so many AdaptFormer
tasks with a bank, and answers one image of each at a high rate, so that weights are folded. For
comparison the same number of models that share nothing, in turns.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from adapters import BackboneInfo, TaskInfo, TaskModel, open_bank
from adapters.task import tensor_shapes
from benchmarks import machine
from benchmarks.estimates import in_turn, markdown, spread
from server.models.loading import load_model
from server.models.weights import Backbones
from server.settings import ModelSettings
from tocom import load_backbone


def make_task(backbone: str, folder: Path, classes: int) -> Path:
    """Save a task that was not tuned, which costs as much as one that was."""
    info = TaskInfo(
        name="task",
        method="adaptformer",
        backbone=BackboneInfo.of(load_backbone(backbone)),
        source=0,
        class_names=tuple(f"class {i}" for i in range(classes)),
        rank=32,
        scale=0.1,
    )
    tensors = {name: torch.randn(shape).half() for name, shape in tensor_shapes(info).items()}
    return TaskModel(info, tensors).save(folder)


def measure(settings: ModelSettings, count: int, rate: int, share: bool) -> dict[str, float]:
    """Return the MiB of this process before and after it loads and runs `count` tasks."""
    torch.set_num_threads(1)
    before = _resident()
    shared = Backbones()
    models = []
    for _ in range(count):
        models.append(load_model(settings, shared if share else Backbones()))
        with torch.inference_mode():
            models[-1].at(rate, compensate=True)(torch.zeros(1, *models[-1].input_size))
    return {"before": before, "after": _resident()}


def _resident() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backbone", default="bundled:deit_tiny")
    parser.add_argument("--bank", default="bundled:deit_tiny_bank")
    parser.add_argument("--tasks", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--rate", type=int, help="default: the bank's highest")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)  # task, count, share
    options = parser.parse_args(argv)
    if options.one:
        folder, count, share = options.one
        settings = ModelSettings(
            name="task", backbone=options.backbone, task=folder, bank=options.bank
        )
        print(json.dumps(measure(settings, int(count), options.rate, share == "True")))
        return
    rate = open_bank(options.bank).info.max_rate if options.rate is None else options.rate
    print(f"{machine.describe()}.\n\n{options.backbone} at rate {rate}, {options.rounds} rounds.\n")
    rows = []
    with tempfile.TemporaryDirectory() as root:
        folder = make_task(options.backbone, Path(root) / "task", options.classes)
        size = sum(file.stat().st_size for file in folder.iterdir()) / 2**20
        for count in options.tasks:
            grown: dict[bool, list[float]] = {True: [], False: []}
            for turn in range(options.rounds):
                for share in in_turn(grown, turn):
                    command = [
                        sys.executable, "-m", "benchmarks.serve_tasks",
                        f"--backbone={options.backbone}", f"--bank={options.bank}",
                        f"--rate={rate}", "--one", str(folder), str(count), str(share),
                    ]  # fmt: skip
                    said = json.loads(subprocess.check_output(command))
                    grown[share].append(said["after"] - said["before"])
            memory = (spread(each, ".0f") for each in grown.values())
            rows.append([count, f"{count * size:.1f}", *memory])
    header = ["tasks", "their folders, MiB", "on one backbone, MiB", "each by itself, MiB"]
    print(markdown(header, rows))


if __name__ == "__main__":
    main()
