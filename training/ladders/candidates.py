"""The ways to be cheaper that are compared: entries of a recipe, at each of their rungs.

An entry is a method on its usual ladder, a ladder, a bank, with which its ladder runs both plain
and repaired, or a model of its own.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch.nn.functional as F
from torch import Tensor

from adapters import Bank, open_bank
from adapters.bank import learned_with
from adapters.ladder import digest, read_ladder
from tocom import (
    Backbone,
    ConfigError,
    FoldedWeights,
    Ladder,
    ReductionWeights,
    Variant,
    cost,
)
from tocom.reduction import method_of
from tocom.vit import embed, outputs
from training.config import BackboneConfig
from training.ladders.chosen import measured_attention, measured_ladder, usual_ladder
from training.ladders.compare_config import EntryConfig
from training.measuring import FoldedDeltas, load_model

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Candidate:
    """One way to be cheaper.

    Attributes:
        name: of its method, ladder or rival.
        backbone: the model that runs.
        rung: of its ladder; of smaller pictures, their height in pixels.
        macs: multiply-adds of an image.
        ladder: what the rung means; None: the stock model.
        proportional: whether merged tokens count in attention by their size.
        learned: weights of the ladder's method, if it learns.
        bank: repairs it; None: it runs plain.
        folded: the bank's deltas.
        seed: of several that were made alike, which.
        pixels: height of the pictures that it sees; None: as they come.
    """

    name: str
    backbone: Backbone
    rung: int
    macs: int
    ladder: Ladder | None = None
    proportional: bool = True
    learned: ReductionWeights | None = None
    bank: Bank | None = None
    folded: FoldedDeltas | None = None
    seed: int = 0
    pixels: int | None = None

    @property
    def key(self) -> tuple[str, int, bool]:
        """What it has in common with those of other seeds."""
        return self.name, self.rung, self.bank is not None

    @property
    def parameters(self) -> int:
        """Weights of the model, and of the plug-ins that repair it."""
        own: int = sum(each.numel() for each in self.backbone.model.parameters())
        if self.backbone.adapter is not None:
            own += sum(a.numel() + b.numel() for a, b in self.backbone.adapter.branches)
        if (learned := self.learned or self.backbone.learned) is not None:
            own += sum(each.numel() for each in learned.tensors.values())
        return own + (self.bank.plugins if self.bank else 0)

    @property
    def variant(self) -> Variant:
        """How its model runs."""
        if self.ladder is None:
            return Variant(0, None, self.backbone.adapter)
        return Variant(
            self.rung, self._delta(), self.backbone.adapter, self.proportional, self.ladder,
            self.learned,
        )  # fmt: skip

    def __call__(self, images: Tensor) -> Tensor:
        """Return the logits [B, classes] of images [B, 3, H, W]."""
        if self.pixels is not None:
            size = (self.pixels, self.pixels)
            images = F.interpolate(images, size, mode="bicubic", antialias=True)
        model = self.backbone.model
        return outputs(model, embed(model, images), self.variant).logits

    def _delta(self) -> FoldedWeights | None:
        source = self.backbone.source
        if self.bank is None or self.folded is None or source == self.rung:
            return None
        return self.folded(
            source, self.rung, self.bank.multiplier(self.backbone, source, self.rung)
        )


class Models:
    """The models of a recipe, each loaded once."""

    def __init__(self, crop_pct: float | None) -> None:
        """Have none yet."""
        self._load = partial(load_model, crop_pct=crop_pct)
        self._loaded: dict[tuple[BackboneConfig, str | None], Backbone] = {}

    def __call__(self, config: BackboneConfig, task: str | None) -> Backbone:
        """Return a model, ready to be measured."""
        if (config, task) not in self._loaded:
            self._loaded[config, task] = self._load(config, task)
        return self._loaded[config, task]


def candidates_of(
    entries: Sequence[EntryConfig],
    backbone: BackboneConfig,
    task: str | None,
    shares: Sequence[float],
    models: Models,
) -> Iterator[Candidate]:
    """Yield the candidates of the entries, plain ones first.

    Args:
        entries: of the recipe.
        backbone, task: the model of those that have none of their own.
        shares: multiply-adds of rungs, as shares of the stock model's.
        models: that are loaded.

    Raises:
        BackboneError, BankError, ConfigError, ReductionError, TaskError: if something cannot be
            had, or does not fit; ConfigError also if two entries have the same name.
    """
    named: dict[str, int] = {}
    for i, entry in enumerate(entries):
        own_task: tuple[str | None, ...] = entry.task or (
            (task,) if task and not entry.backbone else (None,)
        )
        for seed in range(entry.runs):
            model = models(_at(entry.backbone or (backbone,), seed), _at(own_task, seed))
            bank = open_bank(_at(entry.bank, seed)) if entry.bank else None
            ladder = _ladder(entry, model, bank, shares)
            name = entry.name or ladder.name
            if named.setdefault(name, i) != i:
                raise ConfigError(f"two entries are called {name!r}; give them different names")
            yield from _rungs(name, entry, model, bank, ladder, shares, seed)


def contents(candidates: Iterable[Candidate]) -> dict[str, list[str]]:
    """Return the digests of the models, tasks, ladders and banks of candidates, by their names."""
    found: dict[str, set[str]] = {}
    for each in candidates:
        ladder = "" if each.ladder is None else digest(each.ladder)
        bank = "" if each.bank is None else each.bank.info.digest
        parts = {each.backbone.digest, each.backbone.task_digest, ladder, bank}
        found.setdefault(each.name, set()).update(parts - {""})
    return {name: sorted(parts) for name, parts in found.items()}


def _ladder(
    entry: EntryConfig, backbone: Backbone, bank: Bank | None, shares: Sequence[float]
) -> Ladder:
    if entry.ladder is not None:
        ladder = read_ladder(entry.ladder).ladder()
    elif entry.method is not None:
        method = method_of(entry.method, entry.options)
        ladder = usual_ladder(method, backbone.model, shares, entry.name or entry.method)
    else:
        if bank is not None:
            bank.check_fits(backbone)
        ladder = measured_ladder(None, backbone, bank, (backbone.source,))
    ladder.check(backbone.model)
    ladder.check_learned(backbone.model, learned_with(backbone, bank))
    return ladder


def _rungs(
    name: str,
    entry: EntryConfig,
    backbone: Backbone,
    bank: Bank | None,
    ladder: Ladder,
    shares: Sequence[float],
    seed: int,
) -> Iterator[Candidate]:
    proportional = measured_attention(None, backbone, bank, (backbone.source,))
    learned = learned_with(backbone, bank)
    folded = FoldedDeltas(backbone, bank) if bank else None
    chosen = list(_chosen(ladder, backbone, bank, shares))
    rungs = [0, *chosen] if entry.own_model else chosen
    for repaired in [None, bank] if bank else [None]:
        for rung in rungs:
            if repaired and rung == backbone.source:
                continue  # nothing to repair
            yield Candidate(
                name=name,
                backbone=backbone,
                rung=rung,
                macs=cost(backbone.model, rung, ladder=ladder).macs,
                ladder=ladder,
                proportional=proportional,
                learned=learned,
                bank=repaired,
                folded=folded if repaired else None,
                seed=seed,
            )


def _chosen(
    ladder: Ladder, backbone: Backbone, bank: Bank | None, shares: Sequence[float]
) -> Iterator[int]:
    """Yield the rungs to run: all that there are; without an end, the dearest at each share."""
    if ladder.top is not None:
        yield from range(1, ladder.top + 1)
        return
    whole = cost(backbone.model).macs
    highest = bank.info.max_rate if bank else backbone.model.patch_embed.num_patches // 2
    spent = [cost(backbone.model, rate, ladder=ladder).macs for rate in range(highest + 1)]
    rates = (
        next((rate for rate, macs in enumerate(spent) if macs <= share * whole), None)
        for share in shares
    )
    yield from dict.fromkeys(rate for rate in rates if rate)


def _at(values: Sequence[T], seed: int) -> T:
    return values[min(seed, len(values) - 1)]
