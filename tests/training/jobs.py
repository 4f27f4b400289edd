"""The smallest training run."""

import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tocom import load_backbone
from training import loop
from training.config import AugmentConfig
from training.loop_config import LoopConfig
from training.pictures.augment import train_transform
from training.pictures.batches import Pictures
from training.pictures.config import PicturesConfig


class Brightness:
    """One linear layer that tells the class by the mean colour."""

    losses_each = 1

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.module: torch.nn.Module = torch.nn.Linear(3, 3)

    def losses(self, images: Tensor, labels: Tensor, micro: int) -> Iterator[Tensor]:
        yield torch.nn.functional.cross_entropy(self.module(images.mean(dim=(2, 3))), labels)

    def notes(self, micros: range) -> dict[str, Any]:
        return {"micros": len(micros)}

    def watch(self) -> dict[str, float]:
        return {}


def run_job(
    job: loop.Job,
    loop_config: LoopConfig,
    pictures: Path,
    model_folder: Path,
    folder: Path,
    clock: Callable[[], float] = time.monotonic,
) -> None:
    backbone, as_measured = load_backbone(str(model_folder)), AugmentConfig(crop="evaluation")
    read = Pictures([PicturesConfig(path=str(pictures))], train_transform(backbone, as_measured))
    accelerator = loop.start(loop_config, folder)
    loop.run(
        accelerator, job, loop_config, loop_config, read, read.keys(), folder, AugmentConfig(),
        clock,
    )  # fmt: skip


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
