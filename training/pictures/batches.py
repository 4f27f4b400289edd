"""Batches of pictures for training and measuring, decoded in worker processes.

The augmentation of a picture is a function of its draw, so the number of worker processes
changes nothing.
"""

import logging
import random
import signal
from collections.abc import Iterator, Sequence
from traceback import clear_frames
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate, get_worker_info

from tocom import Backbone, DataError
from training.config import DistillConfig, ElasticConfig
from training.pictures.augment import evaluation_transform, least_side, train_transform
from training.pictures.config import PicturesConfig
from training.pictures.sampler import Draw, StepSampler
from training.pictures.sets import PictureSet, open_pictures
from training.pictures.unseen import read_unseen
from training.prune.config import PruneConfig
from training.seeds import derive

_AT_ONCE = 50  # pictures in a batch for measuring
_log = logging.getLogger(__name__)


class Pictures(Dataset[tuple[Tensor, Any, int]]):
    """Pictures of several sets under one transform, asked for by `Draw`.

    An item is the picture [3, H, W], its class, or which it has [C], and the number of unreadable
    pictures that were passed over for it. Classes of several sets need not be the same: -1.
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
        self.least_side = least_side(transform)
        self.on_unreadable = on_unreadable
        self.held_out: frozenset[tuple[int, int]] = frozenset()

    def __getitem__(self, draw: Draw) -> tuple[Tensor, Any, int]:
        """Return the transformed picture [3, H, W], its class and how many were passed over.

        Raises:
            DataError: if it cannot be read and shall not be passed over, or if none can.
        """
        picture, label, skipped = self._read(draw)
        seed_augmentation(draw)
        return self.transform(picture), label if len(self.parts) == 1 else -1, skipped

    def keys(self) -> list[tuple[int, int]]:
        """Return (part, index) of every picture that is not held out."""
        every = ((p, i) for p, part in enumerate(self.parts) for i in range(len(part)))
        return [key for key in every if key not in self.held_out]

    def hold_out(self, count: int) -> list[tuple[int, int]]:
        """Split off and return the keys of `count` pictures, spread evenly over all.

        They do not stand in for unreadable ones either.

        Raises:
            DataError: if no picture would be left.
        """
        keys = self.keys()
        if count >= len(keys):
            raise DataError(
                f"unseen={count} pictures cannot be held out of {len(keys)}: give at most "
                f"{len(keys) - 1}, one must be left to train on"
            )
        held = sorted({keys[i * len(keys) // count] for i in range(count)})
        self.held_out |= frozenset(held)
        return held

    def _read(self, draw: Draw) -> tuple[Image.Image, Any, int]:
        part = self.parts[draw.part]
        following = ((draw.index + i) % len(part) for i in range(len(part)))
        allowed = (index for index in following if (draw.part, index) not in self.held_out)
        for skipped, index in enumerate(allowed):
            if read := self._try(part, index):
                return *read, skipped
        raise DataError(f"none of the {len(part)} pictures of {part.path} can be read")

    def _try(self, part: PictureSet, index: int) -> tuple[Image.Image, Any] | None:
        try:
            return self._decoded(part, index)
        except DataError as error:
            if self.on_unreadable == "stop":
                raise
            _log.warning("%s; the next one is taken", error)
            return None

    def _decoded(self, part: PictureSet, index: int) -> tuple[Image.Image, int]:
        return part.read(index, self.least_side)


def seed_augmentation(draw: Draw) -> None:
    """Let what is drawn next be a function of a draw."""
    seed = derive(draw.seed, "augment", draw.position)  # here, where workers share out the time
    random.seed(seed)
    np.random.seed(seed)
    # Not torch.manual_seed, which also seeds accelerators: slower, and theirs are the loop's.
    torch.default_generator.manual_seed(seed)


class Batches(DataLoader[Any]):
    """A DataLoader whose worker processes report unreadable pictures as plainly as this one.

    Its batches are copied to a GPU, if there is one, while that computes.
    """

    def __init__(self, pictures: Pictures, workers: int, **options: Any) -> None:
        """Decode in `workers` processes; the other arguments are DataLoader's."""
        super().__init__(
            pictures,
            num_workers=workers,
            worker_init_fn=_start_worker,
            pin_memory=torch.cuda.is_available(),
            **options,
        )

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


class Unlabelled(NamedTuple):
    """Pictures to learn from without their labels."""

    pictures: Pictures
    keys: list[tuple[int, int]]  # of an epoch: a set's pictures as often as it counts
    distinct: int
    unseen: list[Tensor]  # batches [B, 3, H, W] that are held out, as they are measured


def split_off(
    backbone: Backbone, config: DistillConfig | ElasticConfig | PruneConfig
) -> tuple[Pictures, list[tuple[int, int]]]:
    """Open the pictures of a recipe and return them with the keys of those that are held out.

    Raises:
        ConfigError, DataError: if they cannot be had, or none would be left.
    """
    pictures = Pictures(
        config.pictures, train_transform(backbone, config.augment), config.loop.on_unreadable
    )
    return pictures, pictures.hold_out(config.unseen)


def unlabelled(
    backbone: Backbone, config: DistillConfig | ElasticConfig | PruneConfig
) -> Unlabelled:
    """Open the pictures of a recipe and read those that are held out, which need no labels.

    Raises:
        ConfigError, DataError: if they cannot be had, or none would be left.
    """
    pictures, held_out = split_off(backbone, config)
    seen = pictures.keys()
    keys = [key for key in seen for _ in range(config.pictures[key[0]].times)]
    shown = Pictures(config.pictures, evaluation_transform(backbone))
    unseen = read_unseen(lambda key: shown[Draw(*key)][0], held_out, config.loop.on_unreadable)
    batches = [torch.stack(unseen[i : i + _AT_ONCE]) for i in range(0, len(unseen), _AT_ONCE)]
    return Unlabelled(pictures, keys, len(seen), batches)


def train_batches(pictures: Pictures, sampler: StepSampler, workers: int) -> Batches:
    """Return the sampler's micro-batches: images, classes [B] or [B, C] and passed over [B].

    The images are [B, 3, H, W] as the transform of `pictures` makes them; see `augment.Finish`.
    """
    return Batches(pictures, workers, batch_sampler=sampler)


def evaluation_batches(
    backbone: Backbone,
    parts: Sequence[PicturesConfig],
    keys: Sequence[tuple[int, int]] | None = None,
    batch_size: int = _AT_ONCE,
    workers: int = 0,
    process: int = 0,
    processes: int = 1,
) -> Batches:
    """Return (images [B, 3, H, W], classes [B] or [B, C]) of the pictures in their order.

    Args:
        backbone: the model that sees them.
        parts: the sets.
        keys: (part, index) of the pictures; None: all.
        batch_size: pictures in a batch.
        workers: processes that decode.
        process, processes: which of how many is asking; each has pictures of its own.
    """
    pictures = Pictures(parts, evaluation_transform(backbone))
    keys = pictures.keys() if keys is None else keys
    draws = [Draw(part, index) for part, index in keys[process::processes]]
    return Batches(
        pictures, workers, batch_size=batch_size, sampler=draws, collate_fn=_without_count
    )


def _without_count(items: list[tuple[Tensor, Any, int]]) -> Any:
    return default_collate([(picture, label) for picture, label, _ in items])


def _stay_once(number: int, _: object) -> None:
    """Stay at a first signal; a second one, as of a process that ends its workers, ends this."""
    signal.signal(number, signal.SIG_DFL)


def _start_worker(_: int) -> None:
    """Give a worker process files of its own; signals are for the process that feeds on it.

    They may go to all processes of a run at once, which still has to end its step and save it.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _stay_once)
    info = get_worker_info()
    assert info is not None
    assert isinstance(info.dataset, Pictures)
    for part in info.dataset.parts:
        part.forget_files()
