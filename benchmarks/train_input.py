"""What the trainer's input makes and what its step takes, in pictures a second, each alone.

    python -m benchmarks.train_input --pictures train.tar --workers 0 1 2

Reading: pictures are decoded and augmented as the recipe says and put into batches of bytes, by so
many worker processes (0: by the program itself), and thrown away. The step: the recipe's
distillation of one batch again and again on the device, normalising, the backward and the optimiser
included. A device is kept busy by as many workers as the step is faster than one of them.
"""

import argparse
import itertools
import json
import math
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import torch

import tocom
from benchmarks import machine
from benchmarks.distill_step import PRECISIONS, autocast, timed
from benchmarks.estimates import markdown, spread
from tocom import load_backbone
from tocom.allocator import keep_freed_memory
from training.config import DistillConfig
from training.distill import Distillation
from training.pictures.augment import train_transform
from training.pictures.batches import Pictures, train_batches
from training.pictures.sampler import StepSampler
from training.presets import read_recipe

SAMPLES = Path(tocom.__file__).parent / "bundled" / "samples"


def reading(pictures: Pictures, batch: int, batches: int, workers: int) -> float:
    """Return the pictures a second that workers make; batches until all are busy do not count."""
    first = 1 + 2 * workers
    sampler = StepSampler(pictures.keys(), batch, first + batches, 0, seed=0)
    reader = iter(train_batches(pictures, sampler, workers))
    for _ in range(first):
        next(reader)
    began = time.perf_counter()
    for _ in reader:
        pass
    return batch * batches / (time.perf_counter() - began)


def stepping(
    config: DistillConfig, pictures: Pictures, steps: int, device: torch.device, precision: str
) -> list[float]:
    """Return the pictures a second of each step, the first left out."""
    backbone = load_backbone(config.backbone.name, device=device)
    job = Distillation(backbone, config, [])
    job.module.to(device).train()
    optimizer = torch.optim.AdamW(job.module.parameters())
    batch = config.loop.batch_size
    sampler = StepSampler(pictures.keys(), batch, 1, 0, seed=0)
    images, labels, _ = next(iter(train_batches(pictures, sampler, workers=0)))
    finish = pictures.transform.finish(device)
    numbers = itertools.count()  # each step has rates of its own

    def step() -> None:
        ready = finish(images.to(device, non_blocking=True))
        losses = job.losses(ready, labels.to(device, non_blocking=True), next(numbers))
        for _ in range(job.losses_each):
            with autocast(device, precision):
                loss = next(losses)
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return [batch / timed(step, device) for _ in range(steps + 1)][1:]


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pictures", default=str(SAMPLES), help="default: the bundled samples")
    parser.add_argument("--recipe", default="deit-tiny-small-data", help="of a distillation")
    parser.add_argument("--backbone", default="bundled:deit_tiny")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--batches", type=int, default=8)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--precision", choices=PRECISIONS, default="fp32", help="of the step")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(argv)

    keep_freed_memory()
    config = read_recipe(
        DistillConfig,
        options.recipe,
        [
            f"pictures=[{{path={json.dumps(options.pictures)}}}]",
            f"backbone.name={json.dumps(options.backbone)}",
            f"loop.batch_size={options.batch}",
            "loop.accumulation=1",
            "unseen=0",
            "relative=false",
        ],
    )
    backbone = load_backbone(config.backbone.name)
    pictures = Pictures(config.pictures, train_transform(backbone, config.augment))
    found: dict[int, list[float]] = {workers: [] for workers in options.workers}
    for _ in range(options.rounds):
        for workers, speeds in found.items():
            speeds.append(reading(pictures, options.batch, options.batches, workers))
    device = torch.device(options.device)
    steps = stepping(config, pictures, options.rounds, device, options.precision)

    print(f"{machine.describe()}.\n\n{options.recipe}, batches of {options.batch}.\n")
    rows = [
        [workers, spread(speeds, ".0f"), spread([each / max(1, workers) for each in speeds], ".0f")]
        for workers, speeds in found.items()
    ]
    print(markdown(["workers", "pictures/s", "of one"], rows))
    one = max(statistics.median(speeds) / max(1, workers) for workers, speeds in found.items())
    needed = math.ceil(statistics.median(steps) / one)
    print(
        f"\nThe step on {device}, {options.precision}: {spread(steps, '.1f')} pictures/s, ", end=""
    )
    print(f"what {needed} such worker{'s' * (needed > 1)} of a core each can feed.")


if __name__ == "__main__":
    main()
