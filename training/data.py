"""Pictures for training and measuring, read and transformed by timm.

Every draw of randomness is a function of (seed, position): the order of pictures, the
augmentation of each. So a run resumes at any step without replaying what went before, and
the number of worker processes changes nothing.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.data import create_dataset, create_transform
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from tocom import Backbone, DataError
from training.config import AugmentConfig, PicturesConfig


@dataclass(frozen=True)
class Draw:
    """One picture to read: where it stands and the seed of its augmentation."""

    part: int
    index: int
    seed: int


class Pictures(Dataset[tuple[Tensor, int]]):
    """Pictures of several sets under one transform, asked for by `Draw`."""

    def __init__(self, parts: Sequence[PicturesConfig], transform: Any) -> None:
        """Open the sets.

        Raises:
            DataError: if one cannot be read or holds no pictures.
        """
        self.paths = [part.path for part in parts]
        self.transform = transform
        self.open()

    def open(self) -> None:
        """Open the sets, anew if they are open."""
        self.parts = [open_pictures(path) for path in self.paths]

    def __getitem__(self, draw: Draw) -> tuple[Tensor, int]:
        """Return the transformed picture [3, H, W] and its class."""
        picture, label = self.parts[draw.part][draw.index]
        random.seed(draw.seed)
        np.random.seed(draw.seed)
        torch.manual_seed(draw.seed)
        return self.transform(picture), label

    def keys(self) -> list[tuple[int, int]]:
        """Return (part, index) of every picture."""
        return [(p, i) for p, part in enumerate(self.parts) for i in range(len(part))]


def open_pictures(path: str) -> Any:
    """Open a folder or a .tar of class folders as a timm dataset of (PIL image, class).

    Raises:
        DataError: if there is nothing to read.
    """
    if not Path(path).exists():
        raise DataError(f"there are no pictures at {path}")
    try:
        return create_dataset("", root=path, search_split=False)
    except (AssertionError, OSError, RuntimeError, ValueError) as error:
        raise DataError(f"{path} holds no pictures in class folders: {error}") from error


class StepSampler:
    """The draws of every step from `start` on: epoch after epoch, shuffled anew in each.

    Args:
        keys: (part, index), repeated as often as each picture counts in an epoch.
        batch_size: pictures a step.
        steps: number of the last step + 1.
        start: first step to draw for.
        seed: of the order and of the augmentations.
    """

    def __init__(
        self, keys: Sequence[tuple[int, int]], batch_size: int, steps: int, start: int, seed: int
    ) -> None:
        """Remember the arguments; nothing is drawn yet."""
        self.keys, self.batch_size, self.seed = keys, batch_size, seed
        self.steps = range(start, steps)

    def __iter__(self) -> Iterator[list[Draw]]:
        """Yield the draws of each step."""
        epoch, order = -1, torch.empty(0, dtype=torch.long)
        for step in self.steps:
            draws = []
            for position in range(step * self.batch_size, (step + 1) * self.batch_size):
                if position // len(self.keys) != epoch:
                    epoch = position // len(self.keys)
                    generator = torch.Generator().manual_seed(derive(self.seed, "order", epoch))
                    order = torch.randperm(len(self.keys), generator=generator)
                part, index = self.keys[int(order[position % len(self.keys)])]
                draws.append(Draw(part, index, derive(self.seed, "augment", position)))
            yield draws

    def __len__(self) -> int:
        """Return the number of steps left."""
        return len(self.steps)


def derive(seed: int, purpose: str, position: int) -> int:
    """Return a 32-bit seed that is a function of its arguments alone."""
    return int(np.random.SeedSequence([seed, *purpose.encode(), position]).generate_state(1)[0])


def train_transform(backbone: Backbone, augment: AugmentConfig) -> Any:
    """Return timm's training transform for what `backbone` wants to see."""
    config = backbone.data_config
    return create_transform(
        input_size=config["input_size"],
        is_training=True,
        scale=augment.scale,
        hflip=augment.hflip,
        color_jitter=augment.color_jitter,
        auto_augment=augment.auto_augment,
        re_prob=augment.erasing,
        interpolation=config["interpolation"],
        mean=config["mean"],
        std=config["std"],
    )


def evaluation_transform(backbone: Backbone) -> Any:
    """Return timm's evaluation transform of `backbone`."""
    return create_transform(**backbone.data_config, is_training=False)


def train_batches(
    pictures: Pictures, sampler: StepSampler, workers: int
) -> DataLoader[tuple[Tensor, int]]:
    """Return the batches of the sampler's steps."""
    return DataLoader(
        pictures,
        batch_sampler=sampler,
        num_workers=workers,
        worker_init_fn=_open_in_worker,
    )


def evaluation_batches(
    backbone: Backbone,
    parts: Sequence[PicturesConfig],
    keys: Sequence[tuple[int, int]] | None = None,
    batch_size: int = 50,
    workers: int = 0,
) -> DataLoader[tuple[Tensor, int]]:
    """Return (images [B, 3, H, W], classes [B]) of the pictures in their order."""
    pictures = Pictures(parts, evaluation_transform(backbone))
    draws = [Draw(part, index, 0) for part, index in (keys or pictures.keys())]
    return DataLoader(
        pictures,
        batch_size=batch_size,
        worker_init_fn=_open_in_worker,
        sampler=draws,
        num_workers=workers,
    )


def _open_in_worker(_: int) -> None:
    """Give a worker process files of its own: forked ones share the position they read at."""
    info = get_worker_info()
    assert info is not None
    pictures = info.dataset
    assert isinstance(pictures, Pictures)
    pictures.open()
