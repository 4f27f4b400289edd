"""The part of a recipe that every training run has: its batch, its length, what it leaves."""

import math
from collections.abc import Callable
from typing import ClassVar, Literal

from pydantic import Field, model_validator
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.scheduler.scheduler import Scheduler
from torch import nn
from torch.optim import Optimizer

from tocom import ConfigError
from training.recipe import Recipe

#: Checkpoints are numbered by six digits.
_TOO_MANY = 10**6


class _LoopConfig(Recipe):
    """What every training run has, but for its length."""

    batch_size: int = Field(gt=0, description="pictures a step, over all processes")
    accumulation: int = Field(1, gt=0, description="micro-batches a step, in each process")
    learning_rate: float = Field(
        gt=0, allow_inf_nan=False, description="peak, as it is: not scaled by the batch"
    )
    weight_decay: float = Field(
        0.05, ge=0, description="of AdamW; not of biases, norms, positions and prefix tokens"
    )
    clip_norm: float | None = Field(
        None, gt=0, description="largest norm of the gradient; larger ones are scaled down to it"
    )
    precision: Literal["no", "bf16", "fp16"] = Field(
        "no", description="Accelerate's mixed precision"
    )
    seed: int = Field(0, ge=0, description="what all random draws of the run follow from")
    workers: int = Field(1, ge=0, description="processes that decode pictures")
    save_every: int = Field(100, gt=0, description="steps between checkpoints")
    watch_every: int = Field(100, gt=0, description="steps between measurements on unseen pictures")
    on_unreadable: Literal["stop", "skip"] = Field(
        "stop", description="a picture that cannot be decoded; skipped ones are counted"
    )
    on_full_disk: Literal["stop", "skip"] = Field(
        "stop", description="a checkpoint or metrics that cannot be written"
    )
    time_limit: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="minutes, after which a run saves and stops; the same command resumes it",
    )
    tensorboard: bool = Field(False, description="also log to TensorBoard, in the run folder")
    wandb: bool = Field(False, description="also log to Weights & Biases, as the project tocom")
    deterministic: bool = Field(
        False, description="torch's deterministic algorithms: the same bits on a GPU, slower"
    )
    recompute_blocks: bool = Field(
        False,
        description="gradient checkpointing: keep what enters a block, run it again for its "
        "gradients; less memory, more time",
    )

    @property
    def micro_batch(self) -> int:
        """Pictures of a micro-batch, of all processes."""
        return self.batch_size // self.accumulation

    @model_validator(mode="after")
    def _shared_out(self) -> "_LoopConfig":
        if self.batch_size % self.accumulation:
            raise ValueError(
                f"batch_size ({self.batch_size}) must be a multiple of accumulation "
                f"({self.accumulation})"
            )
        return self


class LoopConfig(_LoopConfig):
    """A training run of so many steps."""

    steps: int = Field(gt=0, lt=_TOO_MANY, description="length of the run")
    warmup_steps: int = Field(
        0, ge=0, description="steps in which the learning rate rises to its peak"
    )

    def make_optimizer(self, module: nn.Module) -> Optimizer:
        """Return timm's optimiser of what a module has to learn."""
        # Biases and norms do not decay, nor what the module names in timm's `no_weight_decay()`.
        optimizer: Optimizer = create_optimizer_v2(
            module, "adamw", lr=self.learning_rate, weight_decay=self.weight_decay
        )
        return optimizer

    def make_scheduler(self, optimizer: Optimizer) -> Scheduler:
        """Return timm's schedule of the learning rate, by the number of the step."""
        return CosineLRScheduler(
            optimizer,
            t_initial=self.steps,
            warmup_t=self.warmup_steps,
            warmup_prefix=False,
            t_in_epochs=False,
        )


class EpochLoopConfig(_LoopConfig):
    """A training run of so many passes over its pictures."""

    #: what it is in steps
    run: ClassVar[Callable[..., LoopConfig]] = LoopConfig

    epochs: float = Field(
        gt=0, allow_inf_nan=False, description="length of the run, in passes over the pictures"
    )
    warmup_epochs: float = Field(
        0,
        ge=0,
        allow_inf_nan=False,
        description="epochs in which the learning rate rises to its peak",
    )
    # Not of a distillation, which runs at so many pairs of rates, each a graph of its own.
    compile: bool = Field(False, description="compile the forward by torch.compile")

    @model_validator(mode="after")
    def _compiled_or_run_again(self) -> "EpochLoopConfig":
        if self.compile and self.recompute_blocks:
            raise ValueError(
                "compile and recompute_blocks exclude each other: a compiled forward decides by "
                "itself what is computed again"
            )
        return self

    def over(self, pictures: int) -> LoopConfig:
        """Return the run in steps, for a number of pictures.

        Raises:
            ConfigError: if those are too many.
        """
        values = self.model_dump(exclude={"epochs", "warmup_epochs", "compile"})
        each = pictures / self.batch_size
        steps, warmup = math.ceil(self.epochs * each), round(self.warmup_epochs * each)
        if steps >= _TOO_MANY:
            raise ConfigError(
                f"loop.epochs={self.epochs:g} of {pictures:,} pictures, {self.batch_size} a step, "
                f"are {steps:,} steps; a run has less than {_TOO_MANY:,}"
            )
        return self.run(steps=steps, warmup_steps=warmup, **values)
