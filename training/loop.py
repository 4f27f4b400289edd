"""The one training loop: steps, schedule, devices, checkpoints, metrics, resume.

A step is a batch of pictures, cut into micro-batches: one for each process and each
accumulation. All randomness is a function of (seed, step, micro-batch). So a resumed run
gives the same numbers as an uninterrupted one, and N processes the same as one process
that accumulates N times; only parameters and optimiser have to be kept.
"""

import importlib.util
import math
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import parse_flag_from_env
from torch import Tensor, nn

from tocom import ConfigError
from training.config import AugmentConfig
from training.loop_config import LoopConfig
from training.pictures.augment import Finish
from training.pictures.batches import Pictures, train_batches
from training.pictures.sampler import Shares, StepSampler
from training.recipe import Recipe
from training.run_folder import RunFolder, TrainingError
from training.screen.header import length
from training.screen.progress import say
from training.seeds import derive

#: What `accelerate launch` says of a configuration in which no process could save the model alone.
_SPLIT_MODELS = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism_config",
}


#: Where metrics may go beside the run folder, and the packages that take them there.
_TRACKERS = {"tensorboard": "TensorBoard", "wandb": "Weights & Biases"}


class Job(Protocol):
    """What is trained: distillation, fine-tuning."""

    #: holds the parameters to train; nothing else in it requires gradients
    module: nn.Module
    #: how many losses a micro-batch has
    losses_each: int

    def losses(self, images: Tensor, labels: Tensor, micro: int) -> Iterator[Tensor]:
        """Yield the losses of a micro-batch; each is followed by its backward.

        Args:
            images: [B, 3, H, W], normalised.
            labels: [B].
            micro: number of the micro-batch, counted from the start of the run.
        """
        ...

    def notes(self, micros: range) -> dict[str, Any]:
        """Say what is worth noting of a step's micro-batches; depends on the numbers alone."""
        ...

    def watch(self) -> dict[str, float]:
        """Measure on unseen pictures, which processes share out; may be empty."""
        ...


def start(config: LoopConfig, folder: Path) -> Accelerator:
    """Return the devices to train on.

    Raises:
        ConfigError: if what the recipe asks for is not installed or not possible here.
    """
    for package, name in _TRACKERS.items():
        if getattr(config, package) and importlib.util.find_spec(package) is None:
            raise ConfigError(f"loop.{package} needs {name}: pip install {package}")
    for flag, name in _SPLIT_MODELS.items():
        if parse_flag_from_env(flag):
            raise ConfigError(
                f"Accelerate is configured for {name}, which splits a model up; here each process "
                "has a whole one: choose multi-GPU without it in `accelerate config`, or torchrun"
            )
    if config.deterministic:
        # cuBLAS reads it when it is first used. What who calls this has set himself stays.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    # Accelerate keeps the precision for the whole process, and a process may train twice.
    AcceleratorState._reset_state()
    try:
        return Accelerator(mixed_precision=config.precision, project_dir=str(folder))
    except ValueError as error:
        raise ConfigError(f"loop.precision={config.precision}: {error}") from error


def run(
    accelerator: Accelerator,
    job: Job,
    config: LoopConfig,
    recipe: Recipe,
    pictures: Pictures,
    keys: list[tuple[int, int]],
    folder: Path,
    augment: AugmentConfig,
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Train `job` to the last step, resuming from the newest checkpoint in `folder`.

    Args:
        accelerator: from `start`.
        job: what is trained.
        config: the loop's part of the recipe.
        recipe: all of it, to be written to (and compared with) the run folder.
        pictures: what to train on, under a `train_transform`.
        keys: which pictures an epoch has; see `StepSampler`.
        folder: the run folder.
        augment: how often in a row each picture is drawn, and whether batches are mixed.
        clock: tells the seconds, for the recipe's time limit.

    Raises:
        ConfigError: if `folder` holds a run of another recipe or of another number of pictures, or
            the batch cannot be shared out to the processes, or to pairs of pictures to mix.
        DataError: if a picture cannot be read and the recipe says to stop.
        TrainingError: if the loss is not finite or the disk is full.
        KeyboardInterrupt: after a checkpoint was saved, when it was asked to stop or its time is
            up.
    """
    ends = math.inf if config.time_limit is None else clock() + 60 * config.time_limit
    run_folder = RunFolder(folder, accelerator, config, len(keys))
    run_folder.claim(recipe)
    trained = [parameter for parameter in job.module.parameters() if parameter.requires_grad]
    job.module, optimizer = accelerator.prepare(job.module, config.make_optimizer(job.module))
    scheduler = config.make_scheduler(optimizer)
    step = run_folder.resume()
    shares = Shares(accelerator.num_processes, accelerator.process_index, config.accumulation)
    sampler = StepSampler(
        keys, config.batch_size, config.steps, step, config.seed, augment.repeats, shares
    )
    if sampler.size % 2 and (augment.mixup or augment.cutmix):
        raise ConfigError(
            f"pictures are mixed in pairs, and a micro-batch has {sampler.size} of them; give a "
            "loop.batch_size that makes it even"
        )
    batches = iter(train_batches(pictures, sampler, config.workers))
    finish = pictures.transform.finish(accelerator.device)
    values = sum(parameter.numel() for parameter in trained)
    say(length(config, keys, values, step))
    if config.warmup_steps >= config.steps:
        say(
            f"the learning rate rises for {config.warmup_steps:,} steps and the run has "
            f"{config.steps:,}: it never reaches its peak"
        )
    with _interruptible() as asked, run_folder.progress(step):
        while step < config.steps:
            began = time.perf_counter()
            scheduler.step_update(step)
            job.module.train()
            totals = _backward(accelerator, job, config, batches, finish, shares, step)
            if config.clip_norm is not None:
                accelerator.clip_grad_norm_(trained, config.clip_norm)
            optimizer.step()
            optimizer.zero_grad()
            line = job.notes(_micros(step, shares))
            rate = optimizer.param_groups[0]["lr"]
            totals[2] = float(asked.is_set() or clock() >= ends)
            # The one moment of a step that waits for the GPU and for the other processes.
            loss, unreadable, stops = accelerator.reduce(totals, reduction="sum").tolist()
            loss /= shares.processes
            if not math.isfinite(loss):
                raise TrainingError(
                    f"the loss of step {step} is {loss} ({line}, learning rate {rate:.2e}); "
                    f"the last checkpoint is kept in {folder}"
                )
            step += 1
            seconds = round(time.perf_counter() - began, 3)
            line = {"step": step, "loss": loss, "learning_rate": rate, "seconds": seconds} | line
            if unreadable:
                line["unreadable"] = int(unreadable)
            watches = _due(step, config.watch_every, config)
            if watches:
                job.module.eval()
                line |= job.watch()
            run_folder.note(line)
            if watches:
                run_folder.show()
            # Several processes stop together, or one would wait for the others.
            stop = stops > 0 or (shares.processes == 1 and asked.is_set())
            if stop or _due(step, config.save_every, config):
                run_folder.save(step)
            if stop:
                say(f"Stopped after step {step}. The same command resumes from there.")
                raise KeyboardInterrupt
    job.module = accelerator.unwrap_model(job.module).eval()


def _backward(
    accelerator: Accelerator,
    job: Job,
    config: LoopConfig,
    batches: Iterator[tuple[Tensor, Tensor, Tensor]],
    finish: Finish,
    shares: Shares,
    step: int,
) -> Tensor:
    """Compute a step's gradients.

    Returns:
        [3] on the device: the loss and the number of unreadable pictures in this process, and 0.
    """
    totals = torch.zeros(3, device=accelerator.device)
    for accumulated in range(shares.accumulation):
        images, labels, unreadable = next(batches)
        totals[1] += unreadable.sum()
        micro = _micros(step, shares)[accumulated * shares.processes + shares.process]
        seed = derive(config.seed, "step", micro)
        torch.manual_seed(seed)
        np.random.seed(seed)  # timm's mixup draws from there
        random.seed(seed)  # and its erasing from here
        images = finish(images.to(accelerator.device, non_blocking=True))
        labels = labels.to(accelerator.device, non_blocking=True)
        losses = job.losses(images, labels, micro)
        for i in range(job.losses_each):
            last = accumulated == shares.accumulation - 1 and i == job.losses_each - 1
            # Gradients travel between processes once a step.
            with nullcontext() if last else accelerator.no_sync(job.module):
                with accelerator.autocast():
                    loss = next(losses)
                accelerator.backward(loss / shares.accumulation)
            totals[0] += loss.detach() / shares.accumulation
    return totals


def _micros(step: int, shares: Shares) -> range:
    """Return the numbers of a step's micro-batches, of all processes."""
    count = shares.processes * shares.accumulation
    return range(step * count, (step + 1) * count)


def _due(step: int, every: int, config: LoopConfig) -> bool:
    return step % every == 0 or step == config.steps


@contextmanager
def _interruptible() -> Iterator[threading.Event]:
    """Let Ctrl-C and SIGTERM end the run between two steps; a second one ends it at once."""
    asked = threading.Event()
    before: dict[signal.Signals, Any] = {}

    def ask(*_: object) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()

    if threading.current_thread() is threading.main_thread():
        before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
