"""What a training run says of itself before its first step."""

from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import Accelerator

from training.loop_config import LoopConfig
from training.pictures.batches import Pictures
from training.recipe import Recipe


def header(
    accelerator: Accelerator,
    config: LoopConfig,
    recipe: Recipe,
    pictures: Pictures,
    keys: Sequence[tuple[int, int]],
    values: int,
    folder: Path,
    step: int,
) -> str:
    """Return a few lines.

    Args:
        accelerator: the devices.
        config: the loop's part of the recipe.
        recipe: all of it.
        pictures: what is trained on.
        keys: which of them an epoch has, repeated as often as each counts.
        values: so many are learned.
        folder: the run folder.
        step: from which the run goes on; 0: it begins.
    """
    rows = [("device", _device(accelerator, config))]
    backbone = getattr(recipe, "backbone", None)
    if backbone is not None:
        rows.append(("backbone", backbone.name))
    distinct, sets = len(set(keys)), len(pictures.parts)
    held = f", {len(pictures.held_out):,} held out" if pictures.held_out else ""
    rows.append(("pictures", f"{distinct:,} distinct, of {_count(sets, 'set')}{held}"))
    rows.append(("learned", _count(values, "value")))
    seen = config.steps * config.batch_size / distinct
    gone_on = f"; gone on with after step {step:,}" if step else ""
    rows.append(
        (
            "steps",
            f"{config.steps:,} of {config.batch_size:,} pictures, each seen {seen:.3g} "
            f"times{gone_on}",
        )
    )
    rows.append(("folder", str(folder)))
    return "\n".join(f"{what:<8}  {value}" for what, value in rows)


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
