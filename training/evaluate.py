"""Measuring a model at every rate, with and without a bank.

For a model tuned at `source` and run at `target`: top-1 accuracy; agreement with, and KL
divergence from, the same model at its source rate. KL is the sharp measure: it moves long
before a label flips. With and without the bank are compared picture by picture. What comes
out: `evaluation.json`, `.md`, `.svg` and `.png`; for several sources with a bank, `matrix.md`,
`.svg` and `.png`.
"""

import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor

from adapters import Bank, compose, open_bank
from adapters.durable import replace_file
from tocom import Backbone, Ladder, cost
from training.ladders.chosen import described, measured_attention, measured_ladder, named
from training.measuring import (
    MEASURES,
    FoldedDeltas,
    Measurement,
    claim,
    load_model,
    standard_error,
)
from training.measuring_config import EvaluateConfig
from training.multi_label.measures import mean_average_precision
from training.plot import plot_evaluation, plot_matrix

_TITLES = {"map": "mAP %", "top1": "top-1 %", "agreement": "agreement %", "kl": "KL (nats)"}
_FORMS = {"map": ".1f", "top1": ".1f", "agreement": ".1f", "kl": ".4f"}


class Asked(NamedTuple):
    """What is measured of a model."""

    bank: Bank | None
    ladder: Ladder
    proportional: bool
    pairs: list[tuple[int, int]]  # of rates (source, target)
    scales: dict[tuple[int, int], float]  # multiplier of the bank's delta, where there is one


def evaluate(config: EvaluateConfig, folder: Path) -> Path:
    """Measure what the recipe asks for and return the path of `evaluation.json`.

    A folder that holds a part of it is gone on with; one that holds all is returned at once.

    Raises:
        BackboneError, BankError, ConfigError, DataError, RateError: before any compute is spent.
    """
    backbone = load_model(config.backbone, config.task, config.crop_pct)
    asked = opened(config, backbone)
    bank, pairs, scales = asked.bank, asked.pairs, asked.scales
    searched = {f"{m}→{n}": s for (m, n), s in scales.items() if bank and s != bank.info.scale}
    path = folder / "evaluation.json"
    if claim(folder, path.name, config, backbone, bank, searched):
        return path
    measurement = measurement_of(config, backbone, asked)
    result: dict[str, Any] = {
        "model": config.model or backbone.architecture,
        "weights_digest": backbone.digest,
        **({"task_digest": backbone.task_digest} if backbone.task_digest else {}),
        "bank": {"name": bank.info.name, "digest": bank.info.digest} if bank else None,
        "ladder": described(asked.ladder),
        **({} if asked.proportional else {"proportional": False}),
        "pictures": measurement.described,
        "rows": measure(measurement, bank, pairs, scales, folder / "progress.json"),
    }
    processes = PartialState()
    if processes.is_main_process:
        (folder / "evaluation.md").write_text(table(result), encoding="utf-8")
        plot_evaluation(result, folder)
        if bank and len({source for source, _ in pairs}) > 1:
            (folder / "matrix.md").write_text(matrix_table(result), encoding="utf-8")
            plot_matrix(result, folder)
        # Last: who finds it finds all the others.
        replace_file(path, json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    processes.wait_for_everyone()
    return path


def opened(config: EvaluateConfig, backbone: Backbone) -> Asked:
    """Return what a recipe asks for; errors as of `evaluate`."""
    bank = open_bank(config.bank) if config.bank else None
    sources = config.sources or (backbone.source,)
    if bank:
        bank.check_fits(backbone, max(sources))
    ladder = measured_ladder(config.ladder, backbone, bank, sources)
    proportional = measured_attention(config.proportional, backbone, bank, sources)
    highest = bank.info.max_rate if bank else ladder.top or config.max_rate
    targets = config.targets or tuple(range(highest + 1))
    for rate in (*sources, *targets):
        cost(backbone.model, rate, ladder=ladder)  # refuses rates that the ladder does not have
    pairs = [(source, target) for source in sources for target in targets]
    scales = _multipliers(backbone, bank, pairs, config.multiplier) if bank else {}
    return Asked(bank, ladder, proportional, pairs, scales)


def measurement_of(config: EvaluateConfig, backbone: Backbone, asked: Asked) -> Measurement:
    """Open the pictures of a recipe; errors as of `Measurement`."""
    return Measurement(
        backbone, config.pictures, config.batch_size, config.workers, config.labelled,
        config.limit, asked.ladder, asked.proportional, asked.bank,
    )  # fmt: skip


def measure(
    measurement: Measurement,
    bank: Bank | None,
    pairs: Sequence[tuple[int, int]],
    scales: Mapping[tuple[int, int], float],
    path: Path,
) -> list[dict[str, Any]]:
    """Return a row for each (source, target).

    Args:
        measurement: model and pictures.
        bank: measured as well, if there is one.
        pairs: of rates (source, target).
        scales: multiplier of the bank's delta for each pair that has one.
        path: where the sums so far are kept.

    Returns:
        Rows of source, target, gmacs, tokens, pictures and, under `plain` and `bank`, `top1` and
        `agreement` in percent and `kl` in nats, `top1` only with labels, and in its place `map`
        where a picture has several classes. Those with a bank have its multiplier and, under
        `bank`, what the pictures say one by one: see `_paired`.
    """
    rates = sorted({rate for pair in pairs for rate in pair})
    ranked = measurement.labelled and measurement.backbone.multi_label
    scores: dict[tuple[tuple[int, int], str], list[Tensor]] = defaultdict(list)
    truth: list[Tensor] = []
    deltas = FoldedDeltas(measurement.backbone, bank) if bank else None

    def figures(tokens: Tensor, classes: Tensor | None) -> Tensor:
        """Return [pairs, 5, measures]; see `_sums`."""
        if ranked and classes is not None:
            truth.append(classes.cpu())
        stock = {rate: measurement.logits(tokens, rate) for rate in rates}
        cells = []
        for source, target in pairs:
            answer = stock[target]
            plain = repaired = measurement.compare(answer, stock[source], classes)
            if ranked:
                scores[(source, target), "plain"].append(answer.cpu())
            if deltas and (scale := scales.get((source, target))) is not None:
                answer = measurement.logits(tokens, target, deltas(source, target, scale))
                repaired = measurement.compare(answer, stock[source], classes)
                if ranked:
                    scores[(source, target), "bank"].append(answer.cpu())
            cells.append(_sums(plain, repaired))
        return torch.stack(cells)

    every = [*rates, *(target for _, target in scales)]
    # Ranks are over all pictures, which are not kept: a killed pass begins anew.
    sums = measurement.total(path, every, figures, resume=not ranked)
    seen = gather_object([(dict(scores), truth)]) if ranked else []
    measures = MEASURES if measurement.labelled and not ranked else MEASURES[1:]
    rows = []
    for (source, target), cell in zip(pairs, sums, strict=True):
        spent, count = measurement.cost(target), measurement.count
        row: dict[str, Any] = {
            "source": source,
            "target": target,
            "gmacs": round(spent.macs / 1e9, 4),
            "tokens": spent.plan.tokens[-1],
            "pictures": count,
            "plain": _means(cell[0], count, measures),
        }
        for how in ("plain", "bank"):
            if ((source, target), how) in scores:
                found = torch.cat(
                    [each for part, _ in seen for each in part.get(((source, target), how), [])]
                )
                has = torch.cat([each for _, part in seen for each in part])
                precision = round(100 * mean_average_precision(found, has), 2)
                row[how] = {"map": precision} | row.get(how, {})
        if (source, target) in scales:
            row["multiplier"] = scales[source, target]
            row["bank"] = row.get("bank", {}) | _means(cell[1], count, measures)
            row["bank"] |= _paired(cell, count, measures)
        rows.append(row)
    return rows


def sign_test(won: int, lost: int) -> float:
    """Return the two-sided p-value of a sign test: how likely so uneven a split is by chance.

    Exact, of Binomial(won + lost, 1/2); ties do not count.
    """
    tosses = won + lost
    # Logarithms, since the binomial coefficients of many pictures are no floats.
    chances = (
        math.exp(
            math.lgamma(tosses + 1)
            - math.lgamma(heads + 1)
            - math.lgamma(tosses - heads + 1)
            - tosses * math.log(2)
        )
        for heads in range(min(won, lost) + 1)
    )
    return min(1.0, 2 * math.fsum(chances))


def table(result: dict[str, Any], targets: Sequence[int] = ()) -> str:
    """Return the rows, or those of the first source at `targets`, as a Markdown table."""
    first = result["rows"][0]["source"]
    rows = [
        row
        for row in result["rows"]
        if not targets or (row["source"] == first and row["target"] in targets)
    ]
    measures = [measure for measure in _TITLES if measure in rows[0]["plain"]]
    pictures = result["pictures"]
    lines = [
        f"{result['model']}, {pictures['count']} pictures of {pictures['name']}{named(result)}; "
        "plain merging / with the bank. Agreement and KL are to the model at its source rate.",
        "",
        "| source | rate | GMACs | tokens left | "
        + " | ".join(_TITLES[name] for name in measures)
        + " |",
        "|---|---|---|---" + "|---" * len(measures) + "|",
    ]
    for row in rows:
        figures = [_cell(row, measure) for measure in measures]
        cells = [row["source"], row["target"], f"{row['gmacs']:.3f}", row["tokens"], *figures]
        lines.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def matrix_table(result: dict[str, Any]) -> str:
    """Return a Markdown table source x target for each measure: plain / with the bank."""
    rows = {(row["source"], row["target"]): row for row in result["rows"]}
    sources, targets = (list(dict.fromkeys(rates)) for rates in zip(*rows, strict=True))
    pictures = result["pictures"]
    lines = [
        f"{result['model']}, {pictures['count']} pictures of {pictures['name']}{named(result)}; "
        "plain merging / with the bank, for each source (row) and rate (column)."
    ]
    for measure, title in _TITLES.items():
        if measure not in result["rows"][0]["plain"]:
            continue
        lines += ["", f"| {title} | " + " | ".join(map(str, targets)) + " |"]
        lines.append("|---" * (1 + len(targets)) + "|")
        for source in sources:
            cells = [_cell(rows[source, target], measure) for target in targets]
            lines.append(f"| {source} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _multipliers(
    backbone: Backbone, bank: Bank, pairs: Sequence[tuple[int, int]], asked: float | None
) -> dict[tuple[int, int], float]:
    """Return the multiplier asked for, or that of serving the model, for each pair with a delta.

    Raises:
        RateError: if the bank does not have a rate.
    """
    scales = {}
    for source, target in pairs:
        compose(bank, source, target)  # refuses rates that the bank does not have
        if source != target:
            own = bank.multiplier(backbone, source, target)
            scales[source, target] = own if asked is None else asked
    return scales


def _cell(row: dict[str, Any], measure: str) -> str:
    figures = [row[what][measure] for what in ("plain", "bank") if what in row]
    return " / ".join(f"{figure:{_FORMS[measure]}}" for figure in figures)


def _sums(plain: Tensor, bank: Tensor) -> Tensor:
    """Return [5, measures] of plain, bank [B, measures]: sums of both and of what differs.

    Rows: plain, bank, pictures where bank is more, where it is less, squares of bank - plain.
    """
    change = bank - plain
    return torch.stack([plain, bank, change > 0, change < 0, change**2]).sum(dim=1)


def _means(sums: Tensor, count: int, measures: Sequence[str]) -> dict[str, float]:
    top1, agreement, kl = (sums / count).tolist()
    means = {"top1": round(100 * top1, 2), "agreement": round(100 * agreement, 2)}
    return {name: (means | {"kl": round(kl, 7)})[name] for name in measures}


def _paired(sums: Tensor, count: int, measures: Sequence[str]) -> dict[str, float | None]:
    """Compare bank with plain picture by picture.

    Returns:
        Of top-1 and of agreement the pictures won and lost and the p-value of their sign test; of
        KL the mean change and its standard error.
    """
    paired: dict[str, float | None] = {}
    for i, name in enumerate(MEASURES[:2]):
        if name in measures:
            won, lost = int(sums[2, i]), int(sums[3, i])
            paired |= {f"{name}_won": won, f"{name}_lost": lost}
            paired[f"{name}_p"] = float(f"{sign_test(won, lost):.4g}")
    change, squares = (sums[1, 2] - sums[0, 2]).item(), sums[4, 2].item()
    error = standard_error(change, squares, count)
    paired["kl_change"] = round(change / count, 7)
    paired["kl_change_se"] = None if error is None else round(error, 7)
    return paired
