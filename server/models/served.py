"""Served models: immutable handles of a backbone, its bank and what a request needs of both.

A handle is for one ladder: a model that is served on several has a handle for each. It never
changes; what it makes on demand (the delta for a rate) is kept, for all threads. Where a handle
ends, requests that run on it still end on it.
"""

import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from adapters import Bank, Calibration, TaskInfo
from adapters.bank import learned_with
from adapters.cascade import Cascade
from adapters.segmentation import SegmentationInfo
from server.engine.rates import Controller
from server.errors import ParameterError, UnknownLadderError
from server.models.graphs import Forward, Graphs
from server.models.ladders import banks_of, check_learned
from server.models.weights import Deltas, calibration_of, check_bank
from server.schemas import Evaluation, Kind
from tocom import TOME, AnyDelta, Backbone, ConfigError, Cost, Ladder, RateError, Variant, cost
from tocom.reduction import ReductionWeights
from tocom.vit import trace


@dataclass(frozen=True, eq=False)
class ServedModel:
    """A model as it is served on a ladder; equal to itself only.

    Attributes:
        name: how requests call it.
        backbone: the stock model.
        bank: what makes up for a rate it was not tuned at; None: it runs without. A bank is for
            one ladder: on its others a model has none.
        source: the rate of the ladder that it was tuned at; 0 if it was tuned on another one.
        transform: from an RGB picture to the image [3, H, W] that the model wants.
        controller: chooses rates for it where requests leave that to the server.
        deltas: for any rate, which models on one backbone share.
        graphs: compiled forwards, which all models of a server share.
        evaluation: what was measured of it, if its folder says so.
        task: the task that was put on the backbone, if any.
        ladder: what its rates mean.
        evidence: what was measured of the ladder, as its file tells it.
        cascade: how its images decide their own compute, if that was calibrated.
        others: the same model on its other ladders; the handle of the default one has them.

    Raises:
        BankError: if the bank is for another backbone.
    """

    name: str
    backbone: Backbone
    bank: Bank | None
    source: int
    transform: Any
    controller: Controller
    deltas: Deltas
    graphs: Graphs
    evaluation: Evaluation | None = None
    task: TaskInfo | SegmentationInfo | None = None
    ladder: Ladder = TOME
    evidence: Mapping[str, Any] = field(default_factory=dict)
    cascade: Cascade | None = None
    others: tuple["ServedModel", ...] = ()
    _made: dict[int, AnyDelta] = field(init=False, default_factory=dict, repr=False)
    _lock: threading.Lock = field(init=False, default_factory=threading.Lock, repr=False)

    def __post_init__(self) -> None:
        if self.bank is not None:
            check_bank(self.bank, self.backbone, self.source)
        _ = self.calibration  # what it warns of is said when the model is loaded

    @property
    def max_rate(self) -> int:
        """The highest rate that requests may ask for."""
        if self.ladder.top is not None:
            return self.ladder.top
        return self.bank.info.max_rate if self.bank else self.backbone.max_rate

    @property
    def kind(self) -> Kind:
        """What it does."""
        return "embedding" if self.backbone.projects else "classification"

    @property
    def class_names(self) -> Sequence[str]:
        """Names of the classes that it tells apart."""
        return () if self.backbone.projects else self.backbone.class_names

    @property
    def ladders(self) -> tuple["ServedModel", ...]:
        """It on all of its ladders, the default one first."""
        return self, *self.others

    def on(self, ladder: str | None) -> "ServedModel":
        """Return it on the ladder of a name; None: on its default one.

        Raises:
            UnknownLadderError: naming those that there are.
        """
        if ladder is None:
            return self
        for each in self.ladders:
            if each.ladder.name == ladder:
                return each
        there = ", ".join(each.ladder.name for each in self.ladders)
        raise UnknownLadderError(
            f"the model {self.name!r} has no ladder {ladder[:100]!r}; there are: {there}"
        )

    @property
    def repaired(self) -> "ServedModel":
        """It on the ladder of its bank; on its default one if it has no bank."""
        return next((each for each in self.ladders if each.bank is not None), self)

    @cached_property
    def costs(self) -> tuple[Cost, ...]:
        """What an image costs, at index r at rate r."""
        size = self.backbone.input_size[1:]
        return tuple(
            cost(self.backbone.model, rate, size, ladder=self.ladder, adapter=self.backbone.adapter)
            for rate in range(self.max_rate + 1)
        )

    @cached_property
    def calibration(self) -> Calibration | None:
        """Multipliers searched for it and this bank, in place of the bank's own."""
        return calibration_of(self.name, self.backbone, self.bank, self.source)

    def parse_rate(self, text: str) -> int:
        """Read an exact rate that a request asks for.

        Raises:
            RateError: naming what is allowed, if it is not.
        """
        # Few digits only: int() refuses thousands of them in its own words.
        if text.isascii() and text.isdigit() and len(text) < 10 and int(text) <= self.max_rate:
            return int(text)
        words = ", or auto" if self.cascade is None else ", auto or cascade"
        raise RateError(
            f"the model {self.name!r} runs at the rates 0 to {self.max_rate}{self.of_ladder}, "
            f"whole numbers{words}; got rate={text[:40]!r}"
        )

    def within(self, budget: float) -> int:
        """Return the lowest rate that takes at most a share of the multiply-adds of rate 0.

        Raises:
            ParameterError: naming what is allowed, if no rate does, or it is no such share.
        """
        shares = [self.share(rate) for rate in range(self.max_rate + 1)]
        if 0 < budget <= 1:
            for rate, share in enumerate(shares):
                if share <= budget:
                    return rate
        least = min(shares)
        raise ParameterError(
            f"a budget is a share of the multiply-adds of rate 0, at most 1; the cheapest rate of "
            f"the model {self.name!r}, {shares.index(least)}{self.of_ladder}, takes "
            f"{math.ceil(10_000 * least) / 10_000:g} of them; got budget={budget:g}"
        )

    @property
    def of_ladder(self) -> str:
        """How messages name its ladder; the paper's needs no name."""
        return "" if self.ladder == TOME else f" of the ladder {self.ladder.name!r}"

    def at(self, rate: int, compensate: bool, trace: bool = False) -> "RateWork":
        """Return the work of a forward at `rate`, in 0..max_rate.

        Where no delta applies, for want of a bank or at the source rate, the work without
        compensation is returned, so that both share their batches.
        """
        compensate = compensate and self.bank is not None and rate != self.source
        return RateWork(self, rate, compensate, trace)

    def with_bank(self, bank: Bank | None) -> "ServedModel":
        """Return a handle of the same model with another bank, or without one.

        Its ladders stay; the bank is for one of them. Weights and what is known of their speed
        are shared.

        Raises:
            BankError: if the bank is for another backbone.
            ConfigError: if it is for none of the ladders, or for another one than the model was
                tuned on, or does not reach the rate that it was tuned at.
        """
        tuned = [(each.ladder, each.source) for each in self.ladders]
        own, *other_banks = banks_of(self.name, tuned, bank)
        pairs = zip(self.others, other_banks, strict=True)
        others = tuple(replace(each, bank=its) for each, its in pairs)
        model = replace(self, bank=own, others=others)
        for each in model.ladders:
            if each.source > each.max_rate:
                raise ConfigError(
                    f"model {self.name!r}: its source rate must be in 0..{each.max_rate}, got "
                    f"{each.source}"
                )
            check_learned(self.name, each.ladder, each.backbone, each.learned)
        return model

    @cached_property
    def learned(self) -> ReductionWeights | None:
        """What the method of its ladder has learned: its bank's, or its own."""
        return learned_with(self.backbone, self.bank)

    def delta(self, rate: int) -> AnyDelta:
        """Return Δ(source→rate): made once, then kept."""
        assert self.bank is not None
        with self._lock:
            if rate not in self._made:
                scale = self.bank.multiplier(self.backbone, self.source, rate)
                self._made[rate] = self.deltas.get(self.bank, self.source, rate, scale)
            return self._made[rate]

    def measure_again(self, rate: int) -> list[Callable[[], None]]:
        """Forget how long batches take at a rate; return what takes note of how long they do now.

        All is to be called where batches run.
        """
        sizes = self.controller.times.forget(rate)
        if rate > self.max_rate:  # of a bank that is served no more
            return []
        return [partial(self.at(rate, compensate=True).warm_up, [size]) for size in sizes]

    def share(self, rate: int) -> float:
        """Return the multiply-adds of an image at a rate, compared to rate 0."""
        return self.costs[rate].macs / self.costs[0].macs

    def tokens(self, rate: int, size: tuple[int, int]) -> int:
        """Return how many tokens enter all blocks together, of an image of a size at a rate."""
        return entering(self.costs[rate])

    @property
    def proportional(self) -> bool:
        """Whether merged tokens count in attention by their size: its bank's word, or its own."""
        return self.bank.info.proportional if self.bank else self.backbone.proportional

    @property
    def bank_digest(self) -> str | None:
        """The content of its bank; None without one."""
        return None if self.bank is None else self.bank.info.digest

    @property
    def device(self) -> torch.device:
        """Where the model runs."""
        device: torch.device = next(self.backbone.model.parameters()).device
        return device

    @property
    def input_size(self) -> tuple[int, int, int]:
        """Channels, height and width of the image that the model wants."""
        return self.backbone.input_size

    @property
    def least_side(self) -> int:
        """Pixels that both sides of a large picture keep when it is decoded at a reduced scale.

        Twice what the transform brings the shorter side to: what is left for it to do is the same
        antialiased reduction, and the answers are (docs/benchmarks.md has the figures).
        """
        crop: float = self.backbone.data_config["crop_pct"]
        return math.ceil(2 * max(self.input_size[1:]) / crop)

    @property
    def grid(self) -> tuple[int, int]:
        """Patches down and across."""
        height, width = self.backbone.model.patch_embed.patch_size
        return self.input_size[1] // height, self.input_size[2] // width


def entering(what: Cost) -> int:
    """Return how many tokens enter all blocks together."""
    return what.plan.tokens_in + sum(what.plan.tokens[:-1])


class Output(NamedTuple):
    """What a model says of one image; all on the CPU."""

    logits: Tensor  # [C] fp32, what the head gives
    features: Tensor  # [D] fp32, what the head reads
    source: Tensor | None = None  # [N] final token that holds each input token, or -1; if traced


@dataclass(frozen=True)
class RateWork:
    """One model at one rate of a ladder, with or without its delta: what the engine batches by."""

    model: ServedModel
    rate: int
    compensate: bool
    trace: bool = False

    @property
    def low(self) -> int:
        """The only rate allowed."""
        return self.rate

    @property
    def high(self) -> int:
        """The only rate allowed."""
        return self.rate

    @property
    def controller(self) -> Controller:
        """The model's."""
        return self.model.controller

    def at(self, rate: int) -> "RateWork":
        """Return itself: there is no other rate."""
        assert rate == self.rate
        return self

    def __call__(self, images: Tensor) -> list[Any]:
        """Run images [B, 3, H, W], from any device, to an `Output` each."""
        graphs = self.model.graphs
        if self.trace:
            return [*chain(*graphs.team.run(partial(self._traced, self.variant()), images))]
        forward = Forward(self.model.backbone.model, self.variant())
        features, logits, _ = graphs.run(forward, images)
        return [*map(Output, logits.float().cpu(), features.float().cpu())]

    def variant(self) -> Variant:
        """Return what is run; its delta is made, unless that is done."""
        model, delta = self.model, self.model.delta(self.rate) if self.compensate else None
        adapter = model.backbone.adapter
        return Variant(self.rate, delta, adapter, model.proportional, model.ladder, model.learned)

    def _traced(self, variant: Variant, images: Tensor) -> list[Output]:
        traced = trace(
            self.model.backbone.model, images.to(self.model.device), variant.rate, variant.delta,
            proportional=variant.proportional, adapter=variant.adapter, ladder=variant.ladder,
            learned=variant.learned,
        )  # fmt: skip
        told = traced.logits.float(), traced.features.float(), traced.source
        return [*map(Output, *(each.cpu() for each in told))]

    def make_delta(self) -> None:
        """Make what the first batch would make."""
        if self.compensate:
            self.model.delta(self.rate)

    def warm_up(self, sizes: Sequence[int]) -> None:
        """Run batches of these sizes on blank images, and take note of how long they take.

        To be called where batches run, so that it takes as long as they do.
        """
        self._seconds(1)  # makes what is made at first
        for size in sizes:
            # A rate at which one image seems slow is not chosen, and so never measured again.
            tries = 2 if size == 1 else 1
            seconds = min(self._seconds(size) for _ in range(tries))
            self.controller.times.measured(self.rate, size, seconds)

    def _seconds(self, size: int) -> float:
        """Return how long a batch of blank images takes."""
        images = torch.zeros(size, *self.model.input_size)
        began = time.perf_counter()
        with torch.inference_mode():
            self(images)
        return time.perf_counter() - began


@dataclass(frozen=True)
class AutoWork:
    """One model at a rate that its controller chooses for each batch, in `low`..`high`."""

    model: ServedModel
    low: int
    high: int
    compensate: bool
    trace: bool = False

    @property
    def rate(self) -> None:
        """Not chosen yet."""
        return

    @property
    def controller(self) -> Controller:
        """The model's."""
        return self.model.controller

    def at(self, rate: int) -> RateWork:
        """Return the same work at one of these rates."""
        return self.model.at(rate, self.compensate, self.trace)
