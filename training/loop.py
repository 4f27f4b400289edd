"""The one training loop: steps, schedule, checkpoints, metrics, resume.

A run folder holds `config.json` (the resolved recipe), `metrics.jsonl` (a line a step),
`checkpoints/step-NNNNNN` (the last two) and what the job makes at its end. A resumed run
gives the same numbers as an uninterrupted one: all randomness of a step is seeded by
(seed, step), so only parameters and optimiser have to be kept.
"""

import json
import math
import re
import shutil
import time
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from timm.scheduler import CosineLRScheduler
from torch import Tensor, nn
from tqdm import tqdm

from tocom import ConfigError, TocomError
from training.config import LoopConfig, Recipe
from training.data import Pictures, StepSampler, derive, train_batches

_KEPT_CHECKPOINTS = 2


class TrainingError(TocomError):
    """A run that cannot go on; the last good checkpoint is kept."""


class Job(Protocol):
    """What is trained: distillation, fine-tuning."""

    #: holds the parameters to train; nothing else in it requires gradients
    module: nn.Module

    def loss(self, images: Tensor, labels: Tensor, step: int) -> tuple[Tensor, dict[str, Any]]:
        """Return the loss of a step and what to note of it."""
        ...

    def watch(self) -> dict[str, float]:
        """Measure on unseen pictures; may be empty."""
        ...


def run(
    job: Job,
    config: LoopConfig,
    recipe: Recipe,
    pictures: Pictures,
    keys: list[tuple[int, int]],
    folder: Path,
) -> None:
    """Train `job` to the last step, resuming from the newest checkpoint in `folder`.

    Args:
        job: what is trained.
        config: the loop's part of the recipe.
        recipe: all of it, to be written to (and compared with) the run folder.
        pictures: what to train on.
        keys: which pictures an epoch has; see `StepSampler`.
        folder: the run folder.

    Raises:
        ConfigError: if `folder` holds a run of another recipe.
        TrainingError: if the loss is not finite.
        KeyboardInterrupt: after a checkpoint was saved.
    """
    _claim(folder, recipe)
    accelerator = Accelerator(mixed_precision=config.precision)
    trained = [parameter for parameter in job.module.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(_decay_groups(trained, config.weight_decay), config.learning_rate)
    job.module, optimizer = accelerator.prepare(job.module, optimizer)
    scheduler = CosineLRScheduler(
        optimizer,
        t_initial=config.steps,
        warmup_t=config.warmup_steps,
        warmup_prefix=False,
        t_in_epochs=False,
    )
    start = _resume(accelerator, folder)
    sampler = StepSampler(keys, config.batch_size, config.steps, start, config.seed)
    progress = tqdm(total=config.steps, initial=start, unit="step", dynamic_ncols=True)
    step = start
    try:
        for images, labels in train_batches(pictures, sampler, config.workers):
            began = time.perf_counter()
            scheduler.step_update(step)
            torch.manual_seed(derive(config.seed, "step", step))
            job.module.train()
            with accelerator.autocast():
                loss, notes = job.loss(
                    images.to(accelerator.device), labels.to(accelerator.device), step
                )
            value = loss.item()
            if not math.isfinite(value):
                rate = optimizer.param_groups[0]["lr"]
                raise TrainingError(
                    f"the loss of step {step} is {value} ({notes}, learning rate {rate:.2e}); "
                    f"the last checkpoint is kept in {folder}"
                )
            accelerator.backward(loss)
            if config.clip_norm is not None:
                accelerator.clip_grad_norm_(trained, config.clip_norm)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            line = {
                "step": step,
                "loss": value,
                "learning_rate": optimizer.param_groups[0]["lr"],
                "seconds": round(time.perf_counter() - began, 3),
            } | notes
            if step % config.watch_every == 0 or step == config.steps:
                job.module.eval()
                line |= job.watch()
            _note(folder, line)
            progress.set_postfix(loss=f"{value:.4f}", refresh=False)
            progress.update()
            if step % config.save_every == 0 or step == config.steps:
                _save(accelerator, folder, step)
    except KeyboardInterrupt:
        _save(accelerator, folder, step)
        progress.write(f"Stopped after step {step}. The same command resumes from there.")
        raise
    finally:
        progress.close()
    job.module = accelerator.unwrap_model(job.module).eval()


def _decay_groups(parameters: list[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """Biases and norms do not decay, as in timm."""
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]


def _claim(folder: Path, recipe: Recipe) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    resolved = json.dumps(recipe.model_dump(mode="json"), indent=2, ensure_ascii=False) + "\n"
    path = folder / "config.json"
    if path.exists() and path.read_text(encoding="utf-8") != resolved:
        raise ConfigError(f"{folder} holds a run of another recipe; choose another run folder")
    path.write_text(resolved, encoding="utf-8")


def _checkpoints(folder: Path) -> list[Path]:
    found = (folder / "checkpoints").glob("step-*")
    return sorted(path for path in found if re.fullmatch(r"step-\d{6}", path.name))


def _save(accelerator: Accelerator, folder: Path, step: int) -> None:
    """Write a checkpoint beside the others and name it when it is whole."""
    final = folder / "checkpoints" / f"step-{step:06d}"
    if final.exists():
        return
    beside = final.with_name(f".{final.name}")
    shutil.rmtree(beside, ignore_errors=True)
    accelerator.save_state(str(beside))
    beside.rename(final)
    for old in _checkpoints(folder)[:-_KEPT_CHECKPOINTS]:
        shutil.rmtree(old)


def _resume(accelerator: Accelerator, folder: Path) -> int:
    """Load the newest checkpoint and return its step; forget metrics written after it."""
    checkpoints = _checkpoints(folder)
    step = int(checkpoints[-1].name.removeprefix("step-")) if checkpoints else 0
    if checkpoints:
        accelerator.load_state(str(checkpoints[-1]))
    path = folder / "metrics.jsonl"
    if path.exists():
        lines = [line for line in path.read_text().splitlines() if line.endswith("}")]
        kept = [line for line in lines if json.loads(line)["step"] <= step]
        path.write_text("".join(f"{line}\n" for line in kept))
    return step


def _note(folder: Path, line: dict[str, Any]) -> None:
    with (folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
