"""Served models: immutable handles of a backbone, its bank and what a request needs of both.

A handle never changes; what it makes on demand (weights folded for a rate) is kept, for all
threads. Where a handle ends, requests that run on it still end on it.
"""

import logging
import threading
import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
from pydantic import ValidationError
from timm.data.transforms_factory import create_transform
from torch import Tensor

from adapters import Bank, compose, open_bank
from adapters.bank import first_fault
from server.schemas import Evaluation
from server.settings import ModelSettings
from tocom import (
    Backbone,
    ConfigError,
    Cost,
    FoldedWeights,
    RateError,
    cost,
    fold,
    forward,
    load_backbone,
)
from tocom.backbones import Calibration

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class ServedModel:
    """A model as it is served; equal to itself only.

    Attributes:
        name: how requests call it.
        backbone: the stock model.
        bank: what makes up for a rate it was not tuned at; None: it runs without.
        calibration: multipliers searched for it and this bank, in place of the bank's own.
        source: the rate that it was tuned at.
        max_rate: requests may ask for 0..max_rate.
        transform: from an RGB picture to the image [3, H, W] that the model wants.
        costs: at index r what an image costs at rate r.
        evaluation: what was measured of it, if its folder says so.
    """

    name: str
    backbone: Backbone
    bank: Bank | None
    calibration: Calibration | None
    source: int
    max_rate: int
    transform: Any
    costs: tuple[Cost, ...]
    evaluation: Evaluation | None = None
    _folded: dict[int, FoldedWeights] = field(default_factory=dict, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def parse_rate(self, text: str) -> int:
        """Read the rate that a request asks for.

        Raises:
            RateError: naming what is allowed, if it is not.
        """
        # Few digits only: int() refuses thousands of them in its own words.
        if text.isascii() and text.isdigit() and len(text) < 10 and int(text) <= self.max_rate:
            return int(text)
        raise RateError(
            f"the model {self.name!r} runs at the rates 0 to {self.max_rate}, whole numbers; "
            f"got rate={text[:40]!r}"
        )

    def at(self, rate: int, compensate: bool) -> "RateWork":
        """Return the work of a forward at `rate`, in 0..max_rate.

        Where no delta applies, for want of a bank or at the source rate, the work without
        compensation is returned, so that both share their batches.
        """
        return RateWork(self, rate, compensate and self.bank is not None and rate != self.source)

    def folded(self, rate: int) -> FoldedWeights:
        """Return the weights with Δ(source→rate) folded in: made once, then kept."""
        assert self.bank is not None
        with self._lock:
            if rate not in self._folded:
                scale = self.calibration.scale(rate) if self.calibration else None
                delta = compose(self.bank, self.source, rate, scale)
                self._folded[rate] = fold(self.backbone.model, delta)
            return self._folded[rate]

    @property
    def device(self) -> torch.device:
        """Where the model runs."""
        device: torch.device = next(self.backbone.model.parameters()).device
        return device

    @property
    def input_size(self) -> tuple[int, int, int]:
        """Channels, height and width of the image that the model wants."""
        channels, height, width = self.backbone.data_config["input_size"]
        return channels, height, width


@dataclass(frozen=True)
class RateWork:
    """One model at one rate, with or without its delta: what the engine batches by."""

    model: ServedModel
    rate: int
    compensate: bool

    def __call__(self, images: Tensor) -> Tensor:
        """Run images [B, 3, H, W], from any device, to logits [B, C] on the model's."""
        delta = self.model.folded(self.rate) if self.compensate else None
        images = images.to(self.model.device)
        return forward(self.model.backbone.model, images, self.rate, delta)


def load_model(settings: ModelSettings, device: str = "cpu") -> ServedModel:
    """Load a model and its bank.

    Raises:
        TocomError: if either cannot be loaded or they do not fit together.
    """
    backbone = load_backbone(settings.backbone, settings.architecture, device)
    if not backbone.class_names:
        raise ConfigError(
            f"model {settings.name!r}: {settings.backbone} has no classification head; "
            "tune it on a task first"
        )
    bank = None if settings.bank is None else _load_bank(settings.bank, backbone)
    model = backbone.model
    size, wanted = tuple(model.patch_embed.img_size), tuple(backbone.data_config["input_size"][1:])
    if size != wanted and not model.dynamic_img_size:
        raise ConfigError(
            f"model {settings.name!r}: its weights are for pictures of {size} pixels, its "
            f"configuration says {wanted}"
        )
    max_rate = bank.info.max_rate if bank else model.patch_embed.num_patches // len(model.blocks)
    source = backbone.source if settings.source is None else settings.source
    if source > max_rate:
        raise ConfigError(
            f"model {settings.name!r}: its source rate must be in 0..{max_rate}, got {source}"
        )
    return ServedModel(
        name=settings.name,
        backbone=backbone,
        bank=bank,
        calibration=_calibration(settings.name, backbone, bank, source),
        source=source,
        max_rate=max_rate,
        transform=create_transform(**backbone.data_config, is_training=False),
        costs=tuple(cost(model, rate, wanted) for rate in range(max_rate + 1)),
        evaluation=_evaluation(settings.name, backbone),
    )


def _load_bank(reference: str, backbone: Backbone) -> Bank:
    bank = open_bank(reference)
    with warnings.catch_warnings(record=True) as notes:
        warnings.simplefilter("always")
        bank.check_fits(backbone)
    for note in notes:
        logger.info("%s", note.message)
    return bank


def _calibration(
    name: str, backbone: Backbone, bank: Bank | None, source: int
) -> Calibration | None:
    """Return the model's calibration if it is one for how the model is served."""
    found = backbone.calibration
    if found is None or bank is None:
        return None
    if found.fits(bank.info.digest, source):
        return found
    logger.warning(
        "model %r: its calibration is ignored, the bank's own multiplier used: it is for the bank "
        "%s at source %d, served is the bank %s at source %d",
        name, found.bank_digest[:12], found.source, bank.info.digest[:12], source,
    )  # fmt: skip
    return None


def _evaluation(name: str, backbone: Backbone) -> Evaluation | None:
    """Return the model's evaluation; one that cannot be shown is no reason not to serve."""
    if backbone.evaluation is None:
        return None
    try:
        return Evaluation.model_validate(backbone.evaluation)
    except ValidationError as error:
        logger.warning("model %r: its evaluation is not shown: %s", name, first_fault(error))
        return None
