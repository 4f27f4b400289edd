"""What a training run says of itself before its first step."""

from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import Accelerator

from training.config import BackboneConfig
from training.loop_config import LoopConfig
from training.pictures.batches import Pictures


def header(
    accelerator: Accelerator,
    config: LoopConfig,
    backbone: BackboneConfig,
    pictures: Pictures,
    keys: Sequence[tuple[int, int]],
    folder: Path,
) -> str:
    """Return what is known before anything is measured, a line each.

    Args:
        accelerator: the devices.
        config: the loop's part of the recipe.
        backbone: which model.
        pictures: what is trained on.
        keys: which of them an epoch has, repeated as often as each counts.
        folder: the run folder.
    """
    held = f", {len(pictures.held_out):,} held out" if pictures.held_out else ""
    sets = _count(len(pictures.parts), "set")
    return _rows(
        device=_device(accelerator, config),
        backbone=backbone.name,
        pictures=f"{len(set(keys)):,} distinct, of {sets}{held}",
        folder=str(folder),
    )


def length(config: LoopConfig, keys: Sequence[tuple[int, int]], values: int, step: int) -> str:
    """Return how much is learned in how many steps, two lines.

    Args:
        config: the loop's part of the recipe.
        keys: as for `header`.
        values: so many are learned.
        step: from which the run goes on; 0: it begins.
    """
    seen = config.steps * config.batch_size / len(set(keys))
    gone_on = f"; gone on with after step {step:,}" if step else ""
    return _rows(
        learned=_count(values, "value"),
        steps=f"{config.steps:,} of {config.batch_size:,} pictures, each seen {seen:.3g} "
        f"times{gone_on}",
    )


def _rows(**rows: str) -> str:
    return "\n".join(f"{what:<8}  {value}" for what, value in rows.items())


def _device(accelerator: Accelerator, config: LoopConfig) -> str:
    device = accelerator.device
    if device.type == "cuda":
        said = f"{device}, {torch.cuda.get_device_name(device)}"
    else:
        said = f"{device}, {_count(torch.get_num_threads(), 'thread')}"
    if accelerator.num_processes > 1:
        said += f", in each of {accelerator.num_processes} processes"
    return said if config.precision == "no" else f"{said}, {config.precision}"


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'s' * (number != 1)}"
