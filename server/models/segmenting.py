"""Served models of segmentation: a decoder on the dense features of a backbone that others share.

Pictures keep their proportions, so that their sizes differ: those of one size run together. What
one costs goes by its size, too.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import Compose, Normalize, ToTensor

from adapters.segmentation import Segmenter
from adapters.segmentation.task import MAX_RATIO, Colour
from server.engine.threads import set_torch_threads
from server.models.budget import DECODING
from server.models.pictures import decoding
from server.models.served import RateWork, ServedModel, entering
from server.schemas import Kind
from server.settings import Settings
from tocom import Cost, Ladder, cost
from tocom.dense import Size, starts


@dataclass(frozen=True, eq=False, kw_only=True)
class ServedSegmenter(ServedModel):
    """A model of segmentation as it is served on a ladder.

    Attributes:
        segmenter: its encoder is the backbone.
    """

    segmenter: Segmenter
    _costs: dict[tuple[int, Size], Cost] = field(init=False, default_factory=dict, repr=False)

    @property
    def kind(self) -> Kind:
        """What it does."""
        return "segmentation"

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes that pixels may have."""
        return self.segmenter.info.class_names

    @property
    def palette(self) -> tuple[Colour, ...]:
        """Red, green and blue of each class."""
        return self.segmenter.info.palette

    @property
    def input_size(self) -> tuple[int, int, int]:
        """Channels, height and width of a window, which is what costs are told of."""
        return self.backbone.input_size[0], *self.segmenter.info.window

    @cached_property
    def costs(self) -> tuple[Cost, ...]:
        """What a window costs, at index r at rate r."""
        return tuple(self.cost_of(rate, self.input_size[1:]) for rate in range(self.max_rate + 1))

    def cost_of(self, rate: int, size: Size) -> Cost:
        """Return what a picture costs that was brought to a size; see `segmentation_cost`."""
        found = self._costs.get((rate, size))
        if found is None:
            found = segmentation_cost(self.segmenter, rate, size, self.ladder)
            self._costs[rate, size] = found
        return found

    def tokens(self, rate: int, size: Size) -> int:
        """Return how many tokens enter all blocks together, of all windows of a picture."""
        _, windows = windows_of(self.segmenter, size)
        return windows * entering(self.cost_of(rate, size))

    def measure_again(self, rate: int) -> list[Callable[[], None]]:
        """Return nothing: it never runs by graphs, and takes as long as before."""
        return []

    def at(self, rate: int, compensate: bool, trace: bool = False) -> "SceneWork":
        """Return the work of a forward at `rate`, in 0..max_rate, as other models do."""
        work = super().at(rate, compensate, trace)
        return SceneWork(self, work.rate, work.compensate)


@dataclass(frozen=True)
class SceneWork(RateWork):
    """A model of segmentation at one rate of a ladder, with or without its delta."""

    model: ServedSegmenter

    def __call__(self, images: Tensor) -> list[Tensor]:
        """Return the scores [K, H / p, W / p] of each of images [B, 3, H, W], on the CPU."""
        model, variant = self.model, self.variant()

        def scores(share: Tensor) -> Tensor:
            return model.segmenter.scores(share.to(model.device), variant).float().cpu()

        return list(torch.cat(model.graphs.team.run(scores, images)))


class Scene:
    """A picture to segment; to call it is to decode it.

    Attributes:
        size: its height and width, once it is decoded.
    """

    def __init__(self, data: bytes | bytearray, model: ServedSegmenter, settings: Settings) -> None:
        """Take the bytes of a picture, and for which model it is."""
        self._data, self._model, self._max_pixels = data, model, settings.max_pixels
        self.size = (0, 0)

    def __call__(self) -> Tensor:
        """Return the image [3, H, W] that the model wants.

        Raises:
            ServerError: what `pictures.decoding` raises.
        """
        data, self._data = self._data, b""  # what is decoded is held no longer
        with decoding(data, self._max_pixels, max_aspect=MAX_RATIO) as picture:
            self.size = picture.height, picture.width
            image: Tensor = self._model.transform(picture)
            return image

    def classes(self, scores: Tensor) -> Tensor:
        """Return the class [H, W] of every pixel, as bytes, from scores [K, h, w] of patches.

        To be called on a thread that may wait until there is room for so many pixels.
        """
        set_torch_threads(1)
        height, width = self.size
        with DECODING.hold(height * width, self._max_pixels):
            return self._model.segmenter.classes(scores[None], self.size)[0]


def scene_transform(segmenter: Segmenter) -> Any:
    """Return what makes of a picture the image [3, H, W] that a segmenter wants."""

    def resized(picture: Image.Image) -> Image.Image:
        height, width = segmenter.size(picture.height, picture.width)
        return picture.resize((width, height), Image.Resampling.BILINEAR)

    config = segmenter.backbone.data_config
    return Compose([resized, ToTensor(), Normalize(config["mean"], config["std"])])


def windows_of(segmenter: Segmenter, size: Size) -> tuple[Size, int]:
    """Return the size of the windows of a picture that was brought to a size, and their number."""
    info = segmenter.info
    window = min(info.window[0], size[0]), min(info.window[1], size[1])
    number = 1
    for length, part, stride in zip(size, window, info.stride, strict=True):
        number *= len(starts(length, part, stride))
    return window, number


def segmentation_cost(segmenter: Segmenter, rate: int, size: Size, ladder: Ladder) -> Cost:
    """Return what a picture costs: its windows through the encoder, and the decoder as the head.

    The plan of tokens is that of one window.
    """
    model = segmenter.backbone.model
    window, windows = windows_of(segmenter, size)
    one = cost(model, rate, window, ladder=ladder, adapter=segmenter.backbone.adapter)
    down, across = model.patch_embed.patch_size
    head = segmenter.decoder.macs((window[0] // down) * (window[1] // across))
    return replace(
        one,
        macs=windows * (one.macs - one.head + head),
        embedding=windows * one.embedding,
        blocks=tuple(windows * each for each in one.blocks),
        head=windows * head,
    )
