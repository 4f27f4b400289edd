"""Pictures for training and measuring, read and transformed by timm.

Every draw of randomness is a function of (seed, position): the order of pictures, the
augmentation of each. So a run resumes at any step without replaying what went before, and
the number of worker processes, and of training processes, changes nothing.
"""

import logging
import math
import random
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from traceback import clear_frames
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, ImageOps
from timm.data import Mixup, auto_augment, create_transform
from timm.data.transforms import RandomResizedCropAndInterpolation
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate, get_worker_info

from tocom import Backbone, ConfigError, DataError
from training.config import AugmentConfig, PicturesConfig
from training.pictures import PictureSet, open_pictures

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Draw:
    """One picture to read: where it stands and the seed of its augmentation."""

    part: int
    index: int
    seed: int


@dataclass(frozen=True)
class Shares:
    """How a step's batch is shared out: one micro-batch for each process and accumulation."""

    processes: int = 1
    process: int = 0
    accumulation: int = 1


class Pictures(Dataset[tuple[Tensor, int, int]]):
    """Pictures of several sets under one transform, asked for by `Draw`.

    An item is the picture [3, H, W], its class and the number of unreadable pictures that were
    passed over for it.
    """

    def __init__(
        self,
        parts: Sequence[PicturesConfig],
        transform: Any,
        on_unreadable: Literal["stop", "skip"] = "stop",
    ) -> None:
        """Open the sets.

        Args:
            parts: the sets.
            transform: of a PIL image.
            on_unreadable: `skip` takes the next picture of the same set that is not held out.

        Raises:
            DataError: if a set cannot be read or holds no pictures.
        """
        self.parts = [open_pictures(part) for part in parts]
        self.transform = transform
        self.least_side = _least_side(transform)
        self.on_unreadable = on_unreadable
        self.held_out: frozenset[tuple[int, int]] = frozenset()

    def __getitem__(self, draw: Draw) -> tuple[Tensor, int, int]:
        """Return the transformed picture [3, H, W], its class and how many were passed over.

        Raises:
            DataError: if it cannot be read and shall not be passed over, or if none can.
        """
        picture, label, skipped = self._read(draw)
        random.seed(draw.seed)
        np.random.seed(draw.seed)
        # Not torch.manual_seed, which also seeds accelerators: slower, and theirs are the loop's.
        torch.default_generator.manual_seed(draw.seed)
        return self.transform(picture), label, skipped

    def keys(self) -> list[tuple[int, int]]:
        """Return (part, index) of every picture that is not held out."""
        every = ((p, i) for p, part in enumerate(self.parts) for i in range(len(part)))
        return [key for key in every if key not in self.held_out]

    def hold_out(self, count: int) -> list[tuple[int, int]]:
        """Split off and return the keys of `count` pictures, spread evenly over all.

        They do not stand in for unreadable ones either.
        """
        keys = self.keys()
        held = sorted({keys[i * len(keys) // count] for i in range(count)})
        self.held_out |= frozenset(held)
        return held

    def _read(self, draw: Draw) -> tuple[Image.Image, int, int]:
        part = self.parts[draw.part]
        following = ((draw.index + i) % len(part) for i in range(len(part)))
        allowed = (index for index in following if (draw.part, index) not in self.held_out)
        for skipped, index in enumerate(allowed):
            if read := self._try(part, index):
                return *read, skipped
        raise DataError(f"none of the {len(part)} pictures of {part.path} can be read")

    def _try(self, part: PictureSet, index: int) -> tuple[Image.Image, int] | None:
        try:
            return part.read(index, self.least_side)
        except DataError as error:
            if self.on_unreadable == "stop":
                raise
            _log.warning("%s; the next one is taken", error)
            return None


class StepSampler:
    """The draws of every micro-batch from step `start` on: epoch after epoch, shuffled anew.

    Each process asks for its own micro-batches, one for each accumulation. So two processes, or
    two accumulations, see halves of the batches that one process sees.

    Args:
        keys: (part, index), repeated as often as each picture counts in an epoch.
        batch_size: pictures a step, of all processes and accumulations.
        steps: number of the last step + 1.
        start: first step to draw for.
        seed: of the order and of the augmentations.
        repeats: draws of a picture in a row, each augmented anew.
        shares: which of the micro-batches to yield.

    Raises:
        ConfigError: if the batch cannot be shared out evenly.
    """

    def __init__(
        self,
        keys: Sequence[tuple[int, int]],
        batch_size: int,
        steps: int,
        start: int,
        seed: int,
        repeats: int = 1,
        shares: Shares = Shares(),
    ) -> None:
        """Remember the arguments; nothing is drawn yet."""
        self.size, rest = divmod(batch_size, shares.processes * shares.accumulation)
        if rest:
            raise ConfigError(
                f"a batch of {batch_size} pictures cannot be shared out to {shares.processes} "
                f"processes x {shares.accumulation} accumulations; give a multiple of "
                f"{shares.processes * shares.accumulation}"
            )
        self.keys, self.seed, self.repeats, self.shares = keys, seed, repeats, shares
        self.batch_size = batch_size
        self.steps = range(start, steps)

    def __iter__(self) -> Iterator[list[Draw]]:
        """Yield the draws of each micro-batch."""
        epoch, order = -1, torch.empty(0, dtype=torch.long)
        for first in self._firsts():
            draws = []
            for position in range(first, first + self.size):
                now, place = divmod(position // self.repeats, len(self.keys))
                if now != epoch:
                    epoch, order = now, self._order(now)
                part, index = self.keys[int(order[place])]
                draws.append(Draw(part, index, derive(self.seed, "augment", position)))
            yield draws

    def __len__(self) -> int:
        """Return the number of micro-batches left."""
        return len(self.steps) * self.shares.accumulation

    def _firsts(self) -> Iterator[int]:
        """Yield the first position of each micro-batch."""
        for step in self.steps:
            for accumulated in range(self.shares.accumulation):
                micro = accumulated * self.shares.processes + self.shares.process
                yield step * self.batch_size + micro * self.size

    def _order(self, epoch: int) -> Tensor:
        generator = torch.Generator().manual_seed(derive(self.seed, "order", epoch))
        return torch.randperm(len(self.keys), generator=generator)


def derive(seed: int, purpose: str, position: int) -> int:
    """Return a 32-bit seed that is a function of its arguments alone."""
    return int(np.random.SeedSequence([seed, *purpose.encode(), position]).generate_state(1)[0])


def train_transform(backbone: Backbone, augment: AugmentConfig) -> Any:
    """Return timm's training transform for what `backbone` wants to see.

    Raises:
        ConfigError: if timm does not know the augmentation.
    """
    if augment.crop == "evaluation":
        return evaluation_transform(backbone)
    config = backbone.data_config
    try:
        return create_transform(
            input_size=config["input_size"],
            is_training=True,
            scale=augment.scale,
            hflip=augment.hflip,
            color_jitter=augment.color_jitter,
            auto_augment=augment.auto_augment,
            re_prob=augment.erasing,
            re_mode="pixel",
            interpolation=augment.interpolation or config["interpolation"],
            mean=config["mean"],
            std=config["std"],
        )
    except (AssertionError, KeyError, ValueError) as error:
        raise ConfigError(
            f"auto_augment is in timm's notation, such as rand-m9-mstd0.5-inc1; got "
            f"{augment.auto_augment!r}: {error}"
        ) from error


def evaluation_transform(backbone: Backbone) -> Any:
    """Return timm's evaluation transform of `backbone`."""
    return create_transform(**backbone.data_config, is_training=False)


def posterize(image: Image.Image, bits: int, **_: Any) -> Image.Image:
    """Keep the highest `bits` of each channel; none: black."""
    if bits < 1:
        return Image.new(image.mode, image.size)
    return ImageOps.posterize(image, min(bits, 8))


# RandAugment's strongest magnitude keeps no bits, which Pillow answered with black before version
# 13 and with an error since.
for _name in ("Posterize", "PosterizeIncreasing", "PosterizeOriginal"):
    auto_augment.NAME_TO_OP[_name] = posterize


def mixing(augment: AugmentConfig, classes: int, label_smoothing: float) -> Mixup | None:
    """Return timm's mixup and cutmix, or None where there is neither.

    It is called with (images [B, 3, H, W], classes [B]), B even; it changes the images in place
    and returns them with targets [B, classes]. It draws from `numpy.random`.
    """
    if not augment.mixup and not augment.cutmix:
        return None
    return Mixup(
        mixup_alpha=augment.mixup,
        cutmix_alpha=augment.cutmix,
        prob=augment.mix_probability,
        switch_prob=augment.mix_switch,
        label_smoothing=label_smoothing,
        num_classes=classes,
    )


class Batches(DataLoader[Any]):
    """A DataLoader whose worker processes report unreadable pictures as plainly as this one."""

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """Yield the batches.

        Raises:
            DataError: if a picture cannot be read.
        """
        try:
            yield from super().__iter__()
        except DataError as error:
            # torch leaves a cycle of frames that holds the worker processes, whose end then waits
            # for the garbage collector, and it puts the worker's traceback before the message.
            clear_frames(error.__traceback__)
            raise DataError(str(error).strip().rpartition("DataError: ")[2]) from None


def train_batches(pictures: Pictures, sampler: StepSampler, workers: int) -> Batches:
    """Return (images [B, 3, H, W], classes [B], passed over [B]) of the sampler's micro-batches."""
    return Batches(
        pictures,
        batch_sampler=sampler,
        num_workers=workers,
        worker_init_fn=_start_worker,
    )


def evaluation_batches(
    backbone: Backbone,
    parts: Sequence[PicturesConfig],
    keys: Sequence[tuple[int, int]] | None = None,
    batch_size: int = 50,
    workers: int = 0,
) -> Batches:
    """Return (images [B, 3, H, W], classes [B]) of the pictures in their order."""
    pictures = Pictures(parts, evaluation_transform(backbone))
    keys = pictures.keys() if keys is None else keys
    draws = [Draw(part, index, 0) for part, index in keys]
    return Batches(
        pictures,
        batch_size=batch_size,
        sampler=draws,
        num_workers=workers,
        worker_init_fn=_start_worker,
        collate_fn=_without_count,
    )


def _least_side(transform: Any) -> int | None:
    """Return the side below which the smallest random crop of a picture would lose detail."""
    crop = transform.transforms[0]
    if not isinstance(crop, RandomResizedCropAndInterpolation):
        return None  # measuring decodes every pixel
    side: int = max(crop.size)
    return math.ceil(side / math.sqrt(crop.scale[0] * min(crop.ratio)))


def _without_count(items: list[tuple[Tensor, int, int]]) -> Any:
    return default_collate([(picture, label) for picture, label, _ in items])


def _start_worker(_: int) -> None:
    """Give a worker process files of its own; Ctrl-C is for the process that feeds on it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    info = get_worker_info()
    assert info is not None
    assert isinstance(info.dataset, Pictures)
    for part in info.dataset.parts:
        part.forget_files()
