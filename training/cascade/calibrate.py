"""Calibrating a cascade: how sure a cheap answer must be for the dear one to be spared.

Unlabelled pictures run at all rates. For each agreement that is asked for, of all chains of rates
and all thresholds between them, the cheapest is kept that answers so many of the pictures as rate 0
does. What comes out: `cascade.json`, which belongs into the model's folder, and `cascade.md`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adapters import Bank, compose, open_bank
from adapters.bank import learned_with
from adapters.cascade import FILE, Cascade, margins, write_cascade
from adapters.ladder import digest
from tocom import Backbone, ConfigError, Ladder, Variant, cost, fold
from tocom.vit import embed, outputs
from training.cascade.chains import Runs, best_points
from training.cascade.config import CascadeConfig
from training.ladders.chosen import measured_attention, measured_ladder
from training.measuring import claim, load_model, refuse_processes
from training.pictures.batches import evaluation_batches
from training.pictures.sets import open_pictures
from training.screen.progress import Progress

#: Rates that are tried where a ladder has more and the recipe says none.
_USUAL = 6


def calibrate_cascade(config: CascadeConfig, folder: Path) -> Path:
    """Calibrate a cascade and return the path of `cascade.json`.

    Raises:
        BackboneError, BankError, ConfigError, DataError, RateError: before any compute is spent.
    """
    refuse_processes("calibrate-cascade")
    model = Calibrated.open(config)
    path, bank = folder / FILE, model.bank
    if claim(folder, path.name, config, model.backbone, bank):
        return path
    runs = model.run(config)
    points = best_points(runs, config.runs, config.agreements)
    cascade = Cascade(
        weights_digest=model.backbone.digest,
        task_digest=model.backbone.task_digest,
        bank_digest=bank.info.digest if bank else None,
        ladder_digest=digest(model.ladder),
        source=model.source,
        points=points,
        pictures={
            "names": [Path(each.path).name for each in config.pictures],
            "count": len(runs.agree),
        },
    )
    (folder / "cascade.md").write_text(
        table(cascade, config.model or model.backbone.architecture), encoding="utf-8"
    )
    return write_cascade(cascade, path)  # last: who finds it finds the table


def table(cascade: Cascade, model: str) -> str:
    """Return a Markdown table of a cascade's points."""
    pictures: Mapping[str, Any] = cascade.pictures
    lines = [
        f"{model}, {pictures['count']} pictures of {', '.join(pictures['names'])}: rates that a "
        "picture runs at, one after the other, and the margins below which it goes on.",
        "",
        "| agreement, % | mean share | rates | margins |",
        "|---|---|---|---|",
    ]
    for point in cascade.points:
        rates = " → ".join(map(str, point.rates))
        thresholds = ", ".join(f"{each:.3g}" for each in point.thresholds)
        lines.append(
            f"| {100 * point.agreement:.2f} | {point.share:.3f} | {rates} | {thresholds} |"
        )
    return "\n".join(lines) + "\n"


def _usual_rates(ladder: Ladder, bank: Bank | None) -> tuple[int, ...]:
    """Return rates from the highest to 0: all, or of many some, evenly spread.

    Raises:
        ConfigError: if nobody says which there are.
    """
    top = ladder.top if ladder.top is not None else bank and bank.info.max_rate
    if not top:
        raise ConfigError(
            f"the ladder {ladder.name!r} does not say its highest rate: name the rates, rates=[8,0]"
        )
    steps = min(top, _USUAL - 1)
    return tuple(round(top * step / steps) for step in range(steps, -1, -1))


@dataclass(frozen=True)
class Calibrated:
    """What a recipe calibrates: a model with its bank, at some rates of a ladder."""

    backbone: Backbone
    bank: Bank | None
    source: int
    ladder: Ladder
    rates: tuple[int, ...]

    @classmethod
    def open(cls, config: CascadeConfig) -> "Calibrated":
        """Open what a recipe names; errors as of `calibrate_cascade`."""
        backbone = load_model(config.backbone, config.task, config.crop_pct)
        if backbone.multi_label:
            raise ConfigError(
                f"{backbone.name} tells several classes of a picture; a cascade is for models that "
                "tell one"
            )
        bank = open_bank(config.bank) if config.bank else None
        source = backbone.source if config.source is None else config.source
        if bank:
            bank.check_fits(backbone, source)
        ladder = measured_ladder(config.ladder, backbone, bank, [source])
        rates = config.rates or _usual_rates(ladder, bank)
        for rate in rates:
            cost(backbone.model, rate, ladder=ladder)  # refuses rates that the ladder does not have
            if bank:
                compose(bank, source, rate)  # and those that the bank does not have
        return cls(backbone, bank, source, ladder, rates)

    @torch.inference_mode()
    def run(self, config: CascadeConfig) -> Runs:
        """Run the pictures of a recipe at all rates."""
        model, variants = self.backbone.model, [self._variant(rate) for rate in self.rates]
        adapter = self.backbone.adapter
        macs = [cost(model, rate, ladder=self.ladder, adapter=adapter).macs for rate in self.rates]
        every = [
            (part, index)
            for part, pictures in enumerate(config.pictures)
            for index in range(len(open_pictures(pictures)))
        ]
        count = min(len(every), config.limit or len(every))
        keys = [every[i * len(every) // count] for i in range(count)]
        batches = evaluation_batches(
            self.backbone, config.pictures, keys, config.batch_size, config.workers
        )
        device = next(model.parameters()).device
        sure: list[Tensor] = []
        best: list[Tensor] = []
        with Progress("measuring", count * sum(macs), "MAC") as bar:
            for images, _ in batches:
                tokens = embed(model, images.to(device, non_blocking=True))
                logits = torch.stack(
                    [outputs(model, tokens, each).logits for each in variants], dim=1
                )  # [B, R, C]
                sure.append(margins(logits).cpu())
                best.append(logits.argmax(dim=-1).cpu())
                bar.update(len(images) * sum(macs))
        classes = torch.cat(best)
        shares = tuple(each / macs[-1] for each in macs)
        return Runs(self.rates, shares, torch.cat(sure), classes == classes[:, -1:])

    def _variant(self, rate: int) -> Variant:
        """Return how the model is served at a rate."""
        backbone, delta = self.backbone, None
        if self.bank and rate != self.source:
            scale = self.bank.multiplier(backbone, self.source, rate)
            delta = fold(backbone.model, compose(self.bank, self.source, rate, scale))
        proportional = measured_attention(None, backbone, self.bank, [self.source])
        learned = learned_with(backbone, self.bank)
        return Variant(rate, delta, backbone.adapter, proportional, self.ladder, learned)
