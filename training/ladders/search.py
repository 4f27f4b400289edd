"""Searching a ladder for a backbone on pictures without labels.

Each rung gets the amounts, block by block, whose answers are closest to rung 0's, by KL divergence,
at a given share of its multiply-adds. The cheapest rung is searched first; each dearer one starts
from it and never leaves a block fewer tokens than the cheaper ones do, so that neighbours stay
alike. What comes out: `ladder.json` with its evidence, `search.md` and plots.

A search is a walk: tokens are moved from one block to another, and a change that lowers the
divergence on the search pictures is kept. Other pictures judge what it found. All draws follow from
the seed, the rung and the number of the try: a killed search goes on to the same ladder.
"""

import json
import math
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adapters.durable import replace_file
from adapters.ladder import LadderInfo, digest, read_ladder, write_ladder
from tocom import Backbone, ConfigError, Ladder, Plan, cost
from tocom.reduction import Method, Place, Unit, method_of
from training.ladders.search_config import LadderSearchConfig
from training.ladders.shown import Shown, draw
from training.measuring import claim, load_model, refuse_processes
from training.plot import plot_search
from training.screen.progress import Progress, following

#: Tokens that one change moves.
_MOVES = (1, 1, 2, 3, 4, 8)
#: How often a change moves all of a block's tokens to the next block that acts: each costs time.
_WHOLE_PLACES = 0.2
#: A try is given up after a batch if it is worse so far by this share, which falls with the root
#: of the batches seen: a few pictures say little.
_HOPELESS = 0.12

#: Tokens removed in each block.
Removed = tuple[int, ...]
#: Values of options of the method.
Options = dict[str, bool | int | float | str]


@dataclass(frozen=True)
class Found:
    """The best of a rung so far.

    Attributes:
        removed: patch tokens that each block removes.
        loss: mean KL divergence from rung 0 on the search pictures, in nats, and what each place
            of reduction adds to it.
        tries: made so far.
        options: of the method, those that were searched.
    """

    removed: Removed
    loss: float
    tries: int = 0
    options: Options = field(default_factory=dict)


def search(config: LadderSearchConfig, folder: Path) -> Path:
    """Search a ladder and return the path of `ladder.json`.

    A folder that holds a part of the search is gone on with; one that holds all is returned.

    Raises:
        BackboneError, ConfigError, DataError, ReductionError: before any compute is spent.
    """
    refuse_processes("search")
    backbone = load_model(config.backbone, config.task, config.crop_pct)
    method, start = opened(config, backbone)
    path, others = folder / "ladder.json", {"start": [digest(start)]} if start else None
    if claim(folder, path.name, config, backbone, None, others=others):
        return path
    searched = Search(backbone, config, method, start, folder)
    searched.run()
    info = LadderInfo.of(searched.ladder(), searched.evidence())
    (folder / "search.md").write_text(table(info), encoding="utf-8")
    plot_search(info.evidence, folder)
    # Last: who finds it finds the table.
    return write_ladder(info, path)


def opened(config: LadderSearchConfig, backbone: Backbone) -> tuple[Method, Ladder | None]:
    """Return the method of a recipe and the ladder to start from; errors as of `search`."""
    model = backbone.model
    method = method_of(config.method, config.options)
    for option, values in config.try_options.items():
        for value in values:
            method_of(config.method, {**config.options, option: value})
    if (reason := method.refuse(model)) is not None:
        raise ConfigError(reason)
    draw(config)  # refuses to ask for more pictures than there are
    if config.start is None:
        return method, None
    start = read_ladder(config.start).ladder()
    start.amounts(0, len(model.blocks), model.patch_embed.num_patches)  # refuses other blocks
    return method, start


class Search:
    """A walk for each rung, the cheapest first."""

    def __init__(
        self,
        backbone: Backbone,
        config: LadderSearchConfig,
        method: Method,
        start: Ladder | None,
        folder: Path,
    ) -> None:
        """Draw and embed the pictures; read what was found before."""
        self.backbone, self.config, self.method, self.start = backbone, config, method, start
        self.patches: int = backbone.model.patch_embed.num_patches
        self.depth = len(backbone.model.blocks)
        self.state = folder / "state.json"
        search, judge = draw(config)
        self.pictures, self.judges = Shown(backbone, config, search), Shown(backbone, config, judge)
        self.found: dict[int, Found] = {}
        if self.state.exists():
            said = json.loads(self.state.read_text(encoding="utf-8"))
            for rung, each in said.items():
                self.found[int(rung)] = Found(**each | {"removed": tuple(each["removed"])})
        if self.found:
            self._take(next(iter(self.found.values())).options)
        self.whole = cost(backbone.model).macs
        least = self._macs((self.patches,) * self.depth) / self.whole
        if config.shares[-1] < least:
            raise ConfigError(
                f"shares: the method {method.name!r} cannot go below {least:.3f} of the "
                f"multiply-adds of this model, got {config.shares[-1]}"
            )

    def run(self) -> None:
        """Search all rungs."""
        rungs = range(len(self.config.shares), 0, -1)
        done = sum(found.tries for found in self.found.values())
        with Progress("searching", self.config.tries * len(rungs), "try", done) as bar:
            for rung in rungs:
                self._walk(rung, bar)

    def ladder(self, *removed: Removed) -> Ladder:
        """Return the ladder of all that was found, or of other rungs."""
        rungs = removed or tuple(found.removed for _, found in sorted(self.found.items()))
        amounts = ((0,) * self.depth, *(self._amounts(rung) for rung in rungs))
        return Ladder(self.config.name, self.method, amounts, self.patches)

    def evidence(self) -> dict[str, Any]:
        """Measure all rungs on pictures that the search has not seen."""
        ladder = self.ladder()
        rows = []
        for rung in following(range(len(self.found) + 1), "judging on other pictures", "rung"):
            figures = self.judges.figures(ladder, rung)
            counted = cost(self.backbone.model, rung, ladder=ladder)
            row = {
                "rung": rung,
                "macs": counted.macs,
                "share": counted.macs / self.whole,
                "tokens": list(counted.plan.tokens),
                "kl": float(figures[:, 2].mean()),
                "agreement": float(figures[:, 1].mean()),
            }
            if rung:
                row["kl_search"] = self._kl(self.pictures.figures(ladder, rung))
            rows.append(row)
        return {
            "architecture": self.backbone.architecture,
            "weights_digest": self.backbone.digest,
            "pictures": [Path(each.path).name for each in self.config.pictures],
            "searched_on": len(torch.cat([stock for _, stock in self.pictures.batches])),
            "judged_on": len(torch.cat([stock for _, stock in self.judges.batches])),
            "tries": self.config.tries,
            "seed": self.config.seed,
            "rows": rows,
        }

    def _walk(self, rung: int, bar: Progress) -> None:
        """Search one rung; those that are cheaper were found."""
        target = self.config.shares[rung - 1] * self.whole
        cheaper = self.found.get(rung + 1)
        best = self.found.get(rung)
        if best is None:
            start = self._start(cheaper, target)
            if cheaper is None:
                self._choose_options(rung, start)
            best = Found(start, self._loss(rung, start, self._figures(start)), 0, self._options())
        hopeless = self._hopeless(self._figures(best.removed))
        while best.tries < self.config.tries:
            rng = random.Random(f"{self.config.seed}/{rung}/{best.tries}")
            change = self._change(rng, best.removed, cheaper, target)
            best = replace(best, tries=best.tries + 1)
            if change is not None and change != best.removed:
                figures = self._figures(change, hopeless)
                if (loss := self._loss(rung, change, figures)) < best.loss:
                    best = replace(best, removed=change, loss=loss)
                    hopeless = self._hopeless(figures)
            bar.update(note=f"rung {rung}: {best.loss:.4f}")
            if cheaper is None and best.tries == self.config.tries // 2:
                self._choose_options(rung, best.removed)
                figures = self._figures(best.removed)
                loss = self._loss(rung, best.removed, figures)
                best = replace(best, loss=loss, options=self._options())
                hopeless = self._hopeless(figures)
            if best.tries % self.config.save_every == 0 or best.tries == self.config.tries:
                self.found[rung] = best
                self._save()
        self.found[rung] = best

    def _start(self, cheaper: Found | None, target: float) -> Removed:
        """Return where a walk begins: `start`'s rung, the cheaper rung, or the same everywhere."""
        begun = self._begun(target)
        if begun is not None:
            shape = begun
        elif cheaper is not None:
            shape = cheaper.removed
        else:
            shape = (self.patches,) * self.depth
        low, high = 0.0, 1.0
        for _ in range(20):
            middle = (low + high) / 2
            scaled = self._clipped(tuple(round(middle * each) for each in shape))
            low, high = (low, middle) if self._macs(scaled) < target else (middle, high)
        scaled = self._fit(random.Random(0), tuple(round(high * each) for each in shape), target)
        return scaled if cheaper is None else self._nested(scaled, cheaper.removed)

    def _begun(self, target: float) -> Removed | None:
        """Return what `start`'s rung with the nearest cost removes."""
        if self.start is None:
            return None
        rungs = range(1, (self.start.top or 0) + 1)
        removed = [self._plan(self.start, rung).removed for rung in rungs]
        return min(removed, key=lambda each: abs(self._macs(each) - target), default=None)

    def _choose_options(self, rung: int, removed: Removed) -> None:
        """Take the best of the values to try, one option after the other."""
        for option, values in self.config.try_options.items():
            losses = {}
            for value in values:
                self._take({option: value})
                losses[value] = self._loss(rung, removed, self._figures(removed))
            self._take({option: min(losses, key=losses.__getitem__)})

    def _take(self, options: Options) -> None:
        now = asdict(self.method)  # type: ignore[call-overload]
        self.method = method_of(self.config.method, now | options)

    def _options(self) -> Options:
        now = asdict(self.method)  # type: ignore[call-overload]
        return {option: now[option] for option in self.config.try_options}

    def _change(
        self, rng: random.Random, removed: Removed, cheaper: Found | None, target: float
    ) -> Removed | None:
        """Return a neighbour that costs as much; None if the draw leads to none."""
        amounts = list(removed)
        for _ in range(rng.choice((1, 1, 2, 3))):
            from_block, to_block = rng.sample(range(self.depth), 2)
            moved = min(rng.choice(_MOVES), amounts[from_block])
            if amounts[from_block] and rng.random() < _WHOLE_PLACES:
                moved = amounts[from_block]
                to_block = self._nearest_place(rng, amounts, from_block)
            amounts[from_block] -= moved
            amounts[to_block] += moved
        changed = self._fit(rng, tuple(amounts), target)
        if cheaper is not None:
            changed = self._nested(changed, cheaper.removed)
        return changed if self._macs(changed) <= target else None

    def _nearest_place(self, rng: random.Random, amounts: Sequence[int], block: int) -> int:
        """Return the other block that acts and is nearest to `block`; any other if none acts."""
        others = [i for i in range(self.depth) if i != block]
        places = [i for i in others if amounts[i]] or others
        return min(places, key=lambda i: (abs(i - block), rng.random()))

    def _fit(self, rng: random.Random, removed: Removed, target: float) -> Removed:
        """Return the same with one block's amount changed so that it just costs `target`."""
        blocks = [i for i in range(self.depth) if removed[i]] or list(range(self.depth))
        for block in rng.sample(blocks, len(blocks)):
            before, after = removed[:block], removed[block + 1 :]
            low, high = 0, self.patches
            while low < high:
                middle = (low + high) // 2
                if self._macs((*before, middle, *after)) <= target:
                    high = middle
                else:
                    low = middle + 1
            fitted = (*before, self._clipped((*before, low, *after))[block], *after)
            if self._macs(fitted) <= target:
                return self._clipped(fitted)
        return removed

    def _nested(self, removed: Removed, cheaper: Removed) -> Removed:
        """Return `removed` with no fewer tokens in each block than `cheaper` has there."""
        if self.method.place is Place.MLP:  # blocks do not hear of each other
            return tuple(map(min, removed, cheaper))
        return _nested(removed, cheaper)

    def _clipped(self, removed: Removed) -> Removed:
        """Return what is really removed."""
        return self._plan(self.ladder(removed), 1).removed

    def _plan(self, ladder: Ladder, rung: int) -> Plan:
        model = self.backbone.model
        prefix: int = model.num_prefix_tokens
        return ladder.plan(
            rung, self.depth, self.patches + prefix, prefix, model.patch_embed.grid_size
        )

    def _macs(self, removed: Removed) -> int:
        return cost(self.backbone.model, 1, ladder=self.ladder(removed)).macs

    def _amounts(self, removed: Removed) -> tuple[int, ...]:
        """Return the amounts of a rung in the method's unit."""
        if self.method.unit is Unit.REMOVED:
            return removed
        left, amounts = self.patches, []
        for each in removed:
            left -= each
            amounts.append(max(1, left) if each else 0)
        return tuple(amounts)

    def _figures(self, removed: Removed, hopeless: Sequence[float] = ()) -> Tensor:
        return self.pictures.figures(self.ladder(removed), 1, hopeless)

    def _loss(self, rung: int, removed: Removed, figures: Tensor) -> float:
        """Return the loss of a rung; infinite if it was given up."""
        if len(figures) < self.config.search_on:
            return math.inf
        costs = self.config.place_cost
        place_cost = costs[rung - 1] if isinstance(costs, tuple) else costs
        return self._kl(figures) * (1 + place_cost * sum(map(bool, removed)))

    def _hopeless(self, figures: Tensor) -> list[float]:
        """Return the means after each batch from which on a try is given up."""
        means: list[float] = []
        seen = 0
        for tokens, _ in self.pictures.batches:
            seen += len(tokens)
            slack = 1 + _HOPELESS / math.sqrt(len(means) + 1)
            means.append(slack * self._kl(figures[:seen]))
        return means

    @staticmethod
    def _kl(figures: Tensor) -> float:
        return float(figures[:, 2].mean())

    def _save(self) -> None:
        said = {str(rung): asdict(found) for rung, found in self.found.items()}
        replace_file(self.state, json.dumps(said) + "\n")


def _nested(removed: Removed, cheaper: Removed) -> Removed:
    """Return `removed` with no fewer tokens after each block than `cheaper` leaves."""
    taken, most, nested = 0, 0, []
    for each, other in zip(removed, cheaper, strict=True):
        most += other
        nested.append(min(each, most - taken))
        taken += nested[-1]
    return tuple(nested)


def table(info: LadderInfo) -> str:
    """Return the rungs and their figures as Markdown."""
    evidence: Any = info.evidence
    lines = [
        f"# {info.name}",
        "",
        f"{evidence['architecture']}, method {info.method.name} {dict(info.method.options)}; "
        f"judged on {evidence['judged_on']} pictures that the search has not seen.",
        "",
        "| rung | share of multiply-adds | GMACs | KL | agreement, % | removed or kept, by block |",
        "|---|---|---|---|---|---|",
    ]
    for row, rung in zip(evidence["rows"], info.rungs or (), strict=True):
        lines.append(
            f"| {row['rung']} | {row['share']:.3f} | {row['macs'] / 1e9:.3f} | {row['kl']:.4f} | "
            f"{100 * row['agreement']:.1f} | {' '.join(map(str, rung))} |"
        )
    return "\n".join([*lines, ""])
