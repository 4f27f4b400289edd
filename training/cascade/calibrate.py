"""Calibrating a cascade: how sure a cheap answer must be for the dear one to be spared.

Unlabelled pictures run at all rates. For each agreement that is asked for, of all chains of rates
and all thresholds between them, the cheapest is kept that answers so many of the pictures as rate 0
does. What comes out: `cascade.json`, which belongs into the model's folder, and `cascade.md`.
"""

from pathlib import Path

import torch
from torch import Tensor

from adapters import Bank, open_bank
from adapters.cascade import FILE, Cascade, margins, write_cascade
from adapters.ladder import digest
from tocom import AnyDelta, Backbone, ConfigError, Ladder, Variant, cost
from tocom.vit import embed, outputs
from training.cascade.chains import Runs, best_points
from training.cascade.config import CascadeConfig
from training.ladders.chosen import measured_attention, measured_ladder
from training.measuring import FoldedDeltas, claim, load_model, refuse_processes
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
    backbone = load_model(config.backbone, config.task, config.crop_pct)
    bank = open_bank(config.bank) if config.bank else None
    source = backbone.source if config.source is None else config.source
    if bank:
        bank.check_fits(backbone, source)
    ladder = measured_ladder(config.ladder, backbone, bank, [source])
    rates = config.rates or _usual_rates(ladder, bank)
    path = folder / FILE
    if claim(folder, path.name, config, backbone, bank):
        return path
    runs, names = _run(config, backbone, bank, ladder, source, rates)
    points = best_points(runs, config.runs, config.agreements)
    cascade = Cascade(
        weights_digest=backbone.digest,
        task_digest=backbone.task_digest,
        bank_digest=bank.info.digest if bank else None,
        ladder_digest=digest(ladder),
        source=source,
        points=points,
        pictures={"names": names, "count": len(runs.agree)},
    )
    (folder / "cascade.md").write_text(
        table(cascade, config.model or backbone.architecture), encoding="utf-8"
    )
    return write_cascade(cascade, path)  # last: who finds it finds the table


def table(cascade: Cascade, model: str) -> str:
    """Return a Markdown table of a cascade's points."""
    pictures = cascade.pictures
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


@torch.inference_mode()
def _run(
    config: CascadeConfig,
    backbone: Backbone,
    bank: Bank | None,
    ladder: Ladder,
    source: int,
    rates: tuple[int, ...],
) -> tuple[Runs, list[str]]:
    """Run all pictures at all rates."""
    proportional = measured_attention(None, backbone, bank, [source])
    deltas = FoldedDeltas(backbone, bank) if bank else None

    def variant(rate: int) -> Variant:
        delta: AnyDelta | None = None
        if deltas and bank and rate != source:
            delta = deltas(source, rate, bank.multiplier(backbone, source, rate))
        return Variant(rate, delta, backbone.adapter, proportional, ladder)

    variants = [variant(rate) for rate in rates]
    macs = [cost(backbone.model, rate, ladder=ladder).macs for rate in rates]
    every = [
        (part, index)
        for part, pictures in enumerate(config.pictures)
        for index in range(len(open_pictures(pictures)))
    ]
    count = min(len(every), config.limit or len(every))
    keys = [every[i * len(every) // count] for i in range(count)]
    batches = evaluation_batches(backbone, config.pictures, keys, config.batch_size, config.workers)
    device = next(backbone.model.parameters()).device
    sure: list[Tensor] = []
    best: list[Tensor] = []
    with Progress("measuring", count * sum(macs), "MAC") as bar:
        for images, _ in batches:
            tokens = embed(backbone.model, images.to(device, non_blocking=True))
            logits = torch.stack(
                [outputs(backbone.model, tokens, each).logits for each in variants], dim=1
            )  # [B, R, C]
            sure.append(margins(logits).cpu())
            best.append(logits.argmax(dim=-1).cpu())
            bar.update(len(images) * sum(macs))
    classes = torch.cat(best)
    runs = Runs(
        rates=rates,
        shares=tuple(each / macs[-1] for each in macs),
        margins=torch.cat(sure),
        agree=classes == classes[:, -1:],
    )
    return runs, [Path(each.path).name for each in config.pictures]
