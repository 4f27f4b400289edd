"""Searching the multiplier of a bank's deltas for one model.

A bank's scale s multiplies all of its deltas; the best one for a tuned model need not be the
one that the bank was distilled with. Several are tried on pictures: by KL divergence from the
model at its source rate, without labels, or by top-1. What comes out: `calibration.json` and
`.md`. Changes neither bank nor model: `tocom-train attach` writes the result into the model's
folder.

Reference: Token Compensator (ToCom), arXiv:2408.06798.
"""

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from adapters import Bank, compose, open_bank
from adapters.durable import replace_file
from tocom import Backbone, ConfigError
from training.ladders.chosen import described, named
from training.measuring import (
    MANY_CLASSES,
    FoldedDeltas,
    Measurement,
    claim,
    class_indices,
    load_model,
    refuse_processes,
    standard_error,
)
from training.measuring_config import CalibrateConfig

_REFINEMENTS = 3  # passes over the pictures; over many, KL is nearly a parabola in s
_CLOSE = 0.01  # relative; closer multipliers differ in nothing that can be measured

#: A target rate, or ALL of them: the mean.
Place: TypeAlias = int | str
ALL = "all"
_MEASURES = {"kl": ("KL divergence (nats)", ".4f"), "top1": ("top-1 (%)", ".2f")}


@dataclass(frozen=True)
class Tried:
    """What a multiplier came to.

    Attributes:
        multiplier: the value of s.
        loss: mean KL divergence in nats, or the share of pictures whose class is missed.
        gain: by how much the bank's own multiplier loses more.
        gain_se: standard error of `gain`, picture by picture; None for a single picture.
    """

    multiplier: float
    loss: float
    gain: float
    gain_se: float | None


def calibrate(config: CalibrateConfig, folder: Path) -> Path:
    """Search the best multipliers and return the path of `calibration.json`.

    A folder that holds a part of the search is gone on with; one that holds all is returned.

    Raises:
        BackboneError, BankError, ConfigError, DataError, RateError: before any compute is spent.
    """
    refuse_processes("calibrate")
    backbone = load_model(config.backbone, config.task, config.crop_pct)
    bank, source, targets = opened(config, backbone)
    path = folder / "calibration.json"
    if claim(folder, path.name, config, backbone, bank):
        return path
    measurement = Measurement(
        backbone, config.pictures, config.batch_size, config.workers,
        labelled=config.measure == "top1", limit=config.limit,
        ladder=bank.ladder, proportional=bank.info.proportional, bank=bank,
    )  # fmt: skip
    search = Search(measurement, bank, source, targets, folder)
    search.run(config.multipliers, config.continuous, config.per_target)
    result = {
        "model": config.model or backbone.architecture,
        "weights_digest": backbone.digest,
        **({"task_digest": backbone.task_digest} if backbone.task_digest else {}),
        "bank": {"name": bank.info.name, "digest": bank.info.digest, "scale": bank.info.scale},
        "ladder": described(bank.ladder),
        "source": source,
        "measure": config.measure,
        "pictures": measurement.described,
        **_result(search, config),
    }
    (folder / "calibration.md").write_text(table(result), encoding="utf-8")
    # Last: who finds it finds the table.
    replace_file(path, json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    return path


def opened(config: CalibrateConfig, backbone: Backbone) -> tuple[Bank, int, list[int]]:
    """Return the bank, the source and the targets of a recipe; errors as of `calibrate`."""
    bank = open_bank(config.bank)
    source = backbone.source if config.source is None else config.source
    bank.check_fits(backbone, source)
    if config.measure == "top1":
        if backbone.multi_label:
            raise ConfigError(f"{backbone.name} {MANY_CLASSES}: there is no top-1, give measure=kl")
        class_indices(config.pictures, backbone, "measure=kl does without")
    return bank, source, _targets(config.targets, bank, source)


class Search:
    """The multipliers that were tried, each beside the bank's own.

    Attributes:
        own: the bank's own multiplier.
        tried: by place and multiplier.
    """

    def __init__(
        self,
        measurement: Measurement,
        bank: Bank,
        source: int,
        targets: Sequence[int],
        folder: Path,
    ) -> None:
        """Remember the arguments; nothing is tried yet.

        Args:
            measurement: model and pictures; labelled ones are measured by top-1.
            bank: whose deltas are multiplied.
            source: rate that the model was tuned at.
            targets: rates that it is tried at.
            folder: where the sums so far are kept.
        """
        self.measurement, self.source, self.targets = measurement, source, targets
        self.folder = folder
        self.deltas = FoldedDeltas(measurement.backbone, bank)
        self.own = bank.info.scale
        self.places: list[Place] = [*targets, ALL]
        self.tried: dict[Place, dict[float, Tried]] = {place: {} for place in self.places}

    def run(self, multipliers: Sequence[float], continuous: bool, per_target: bool) -> None:
        """Try `multipliers` at all targets; then, if `continuous`, others between them."""
        others = [s for s in dict.fromkeys(multipliers) if s != self.own]
        self._pass(0, {target: [self.own, *others] for target in self.targets})
        for number in range(1, 1 + _REFINEMENTS * continuous):
            if per_target:
                lowest = {target: _lowest(self.tried[target]) for target in self.targets}
            else:
                lowest = dict.fromkeys(self.targets, _lowest(self.tried[ALL]))
            new = {target: [self.own, s] for target, s in lowest.items() if s is not None}
            if not new:
                return
            self._pass(number, new)

    def best(self, place: Place) -> Tried:
        """Return the multiplier that loses least; of equals the one next to the bank's own."""
        tried = self.tried[place].values()
        return min(tried, key=lambda one: (one.loss, abs(one.multiplier - self.own)))

    def _pass(self, number: int, scales: Mapping[int, list[float]]) -> None:
        """Try multipliers, equally many at each target, the first of them the bank's own."""
        model = self.measurement

        def figures(tokens: Tensor, classes: Tensor | None) -> Tensor:
            """Return [2, targets + 1, multipliers]: sums of loss, and of gain squared."""
            stock = model.logits(tokens, self.source)
            losses = torch.stack(
                [
                    torch.stack([self._loss(tokens, stock, classes, target, s) for s in row], -1)
                    for target, row in scales.items()
                ],
                dim=1,
            )  # [B, targets, multipliers]
            losses = torch.cat([losses, losses.mean(dim=1, keepdim=True)], dim=1)
            gain = losses[..., :1] - losses
            return torch.stack([losses, gain**2]).sum(dim=1)

        rates = [self.source, *(target for target, row in scales.items() for _ in row)]
        sums = model.total(self.folder / f"progress-{number}.json", rates, figures)
        columns = list(scales.values())
        same = len(columns) == len(self.targets) and all(row == columns[0] for row in columns)
        tried: list[tuple[Place, list[float]]] = [*scales.items()]
        if same:
            tried.append((ALL, columns[0]))
        for i, (place, row) in enumerate(tried):
            for j, s in enumerate(row):
                loss, squares = sums[0, i, j].item(), sums[1, i, j].item()
                gain, count = sums[0, i, 0].item() - loss, model.count
                error = standard_error(gain, squares, count)
                self.tried[place][s] = Tried(s, loss / count, gain / count, error)

    def _loss(
        self, tokens: Tensor, stock: Tensor, classes: Tensor | None, target: int, s: float
    ) -> Tensor:
        """Return each picture's KL divergence [B] or, with labels, 1 where its class is missed."""
        answer = self.measurement.logits(tokens, target, self.deltas(self.source, target, s))
        top1, _, kl = self.measurement.compare(answer, stock, classes).unbind(dim=-1)
        return kl if classes is None else 1 - top1


def table(result: dict[str, Any]) -> str:
    """Return a Markdown table multiplier x target of the measure, the best of each target bold."""
    values = {(row["multiplier"], row["target"]): row[result["measure"]] for row in result["tried"]}
    multipliers = sorted({multiplier for multiplier, _ in values})
    places = list(dict.fromkeys(place for _, place in values))
    better = min if result["measure"] == "kl" else max
    best = {
        place: better(value for (_, other), value in values.items() if other == place)
        for place in places
    }
    title, form = _MEASURES[result["measure"]]
    own, pictures = result["bank"]["scale"], result["pictures"]
    lines = [
        f"{result['model']}, source {result['source']}, {pictures['count']} pictures of "
        f"{pictures['name']}{named(result)}: {title} with bank {result['bank']['name']}, "
        f"whose own multiplier is {own:g}, for each multiplier and rate.",
        "",
        "| multiplier | " + " | ".join(map(str, places)) + " |",
        "|---" * (1 + len(places)) + "|",
    ]
    for multiplier in multipliers:
        cells = []
        for place in places:
            value = values.get((multiplier, place))
            text = "" if value is None else f"{value:{form}}"
            cells.append(f"**{text}**" if value == best[place] else text)
        lines.append(f"| {multiplier:g} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", result["summary"], ""])


def _targets(asked: Sequence[int], bank: Bank, source: int) -> list[int]:
    rates = asked or [rate for rate in range(bank.info.max_rate + 1) if rate != source]
    targets = list(dict.fromkeys(rates))
    if source in targets:
        raise ConfigError(
            f"targets must not hold the source rate {source}: there the model runs as it is"
        )
    for target in targets:
        compose(bank, source, target)  # refuses rates that the bank does not have
    return targets


def _lowest(tried: Mapping[float, Tried]) -> float | None:
    """Return where the parabola through the best multiplier and its neighbours is lowest.

    None where the best one has a neighbour on one side only, or where a multiplier so close was
    tried already.
    """
    points = sorted(tried)
    best = min(range(len(points)), key=lambda i: tried[points[i]].loss)
    if best in (0, len(points) - 1):
        return None
    left, middle, right = points[best - 1 : best + 2]
    falling = (tried[middle].loss - tried[left].loss) / (middle - left)
    rising = (tried[right].loss - tried[middle].loss) / (right - middle)
    if falling == rising:
        return None
    vertex = (left + middle) / 2 - falling * (right - left) / (rising - falling) / 2
    if any(abs(vertex - point) < _CLOSE * point for point in points):
        return None
    return float(f"{vertex:.4g}")


def _result(search: Search, config: CalibrateConfig) -> dict[str, Any]:
    """Return what the search found: the multiplier, all that was tried, and a sentence."""
    best = {place: search.best(place) for place in search.tried}
    unit = 1 if config.measure == "kl" else 100
    multiplier: float | dict[str, float] = best[ALL].multiplier
    if config.per_target:
        multiplier = {str(target): best[target].multiplier for target in search.targets}
    return {
        "multiplier": multiplier,
        "summary": _summary(search, best, config),
        "tried": [
            {
                "target": place,
                "multiplier": one.multiplier,
                config.measure: round(_value(one.loss, config.measure), 7),
                "gain": round(unit * one.gain, 7),
                "gain_se": one.gain_se and round(unit * one.gain_se, 7),
            }
            for place, tried in search.tried.items()
            for one in sorted(tried.values(), key=lambda one: one.multiplier)
        ],
    }


def _summary(search: Search, best: Mapping[Place, Tried], config: CalibrateConfig) -> str:
    """Say what the multipliers give over the bank's own, and whether that is beyond chance."""
    places: Sequence[Place] = search.targets if config.per_target else [ALL]
    if all(best[place].multiplier == search.own for place in places):
        tried = len(search.tried[places[0]])
        return f"No gain: the bank's own multiplier {search.own:g} is the best of {tried} tried."
    title, form = _MEASURES[config.measure]
    now, before = (
        _value(statistics.fmean(losses), config.measure)
        for losses in (
            [best[place].loss for place in places],
            [search.tried[place][search.own].loss for place in places],
        )
    )
    sure = [place for place in places if best[place].gain > 2 * (best[place].gain_se or 0.0)]
    ends = [
        place
        for place in places
        if best[place].multiplier in (min(search.tried[place]), max(search.tried[place]))
    ]
    rates = f"{len(search.targets)} rates"
    if config.per_target:
        what = "A multiplier for each rate"
        chance = f"At {len(sure)} of them the gain is more than twice its standard error"
        end = f" At the rates {', '.join(map(str, ends))} the best is the least or the most tried."
    else:
        what = f"Multiplier {best[ALL].multiplier:g}"
        chance = f"The gain is {'more' if sure else 'less'} than twice its standard error"
        end = " The best is the least or the most tried: others beyond it may be better."
    return (
        f"{what} instead of the bank's own {search.own:g}: {title} {now:{form}} instead of "
        f"{before:{form}}, mean of {rates}. {chance}.{end if ends else ''}"
    )


def _value(loss: float, measure: str) -> float:
    return loss if measure == "kl" else 100 * (1 - loss)
