"""Plots: the curves of a run, quality against compute, what a bank gives for each pair of rates."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # files only: no display is needed

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from adapters.durable import replace_file
from training.screen.curves import Watched

_MEASURES = {
    "map": "mAP (%)",
    "kl": "KL to the source rate (nats)",
    "agreement": "agreement with the source rate (%)",
    "top1": "top-1 (%)",
}
#: measure -> title, colours (blue is better), form of a cell
_CHANGES = {
    "map": ("mAP (points)", "RdBu", "{:+.1f}"),
    "kl": ("KL (%)", "RdBu_r", "{:+.0f}"),
    "agreement": ("agreement (points)", "RdBu", "{:+.1f}"),
    "top1": ("top-1 (points)", "RdBu", "{:+.1f}"),
}
_SMOOTHED = 50  # each point of a smoothed curve is the mean of such a part of the run
_ANNOTATED = 9  # rates a side; with more, figures would cover their cells


def plot_evaluation(result: dict[str, Any], folder: Path) -> None:
    """Write `evaluation.svg` and `.png`: each measure against GMACs, a colour a source."""
    sources = sorted({row["source"] for row in result["rows"]})
    measures = _measured(result)
    figure, axes = plt.subplots(
        1, len(measures), figsize=(4 * len(measures), 3.6), layout="constrained"
    )
    for axis, measure in zip(axes, measures, strict=True):
        for i, source in enumerate(sources):
            # At the source rate itself there is nothing to compare.
            rows = [r for r in result["rows"] if r["source"] == source != r["target"]]
            gmacs = [row["gmacs"] for row in rows]
            name = f"source {source}" if len(sources) > 1 else "model"
            axis.plot(
                gmacs, [row["plain"][measure] for row in rows], "o--", ms=3, lw=1, color=f"C{i}",
                alpha=0.6, label=f"{name}, plain",
            )  # fmt: skip
            if any("bank" in row for row in rows):
                axis.plot(
                    gmacs, [row.get("bank", row["plain"])[measure] for row in rows], "o-", ms=4,
                    color=f"C{i}", label=f"{name}, with bank",
                )  # fmt: skip
        axis.set(xlabel="GMACs an image", ylabel=_MEASURES[measure])
        axis.invert_xaxis()  # cheaper to the right, as the rate grows
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    save(figure, result, folder / "evaluation")


def plot_curves(
    losses: Sequence[tuple[int, float]], watched: Sequence[Watched], path: Path
) -> None:
    """Write a PNG of a run so far, whole or not at all.

    Args:
        losses: (step, loss) of each step.
        watched: what was measured on unseen pictures; may be empty.
        path: of the file.
    """
    figure, axes = plt.subplots(
        1, 2 if watched else 1, figsize=(9 if watched else 4.8, 3.6), layout="constrained",
        squeeze=False,
    )  # fmt: skip
    ((left, *right),) = axes
    steps, values = (np.array(column) for column in zip(*losses, strict=True))
    left.plot(steps, values, lw=0.5, alpha=0.3, color="C0")
    window = max(1, len(values) // _SMOOTHED)
    smooth = np.convolve(values, np.full(window, 1 / window), "valid")
    left.plot(steps[window - 1 :], smooth, color="C0")
    title = "loss" if window == 1 else f"loss, and its mean over {window} steps"
    left.set(xlabel="step", ylabel="loss", title=title)
    for axis in right:
        for i, rate in enumerate(watched[-1].now):
            known = [each for each in watched if rate in each.now]
            axis.plot(
                [each.step for each in known], [each.now[rate] for each in known], "o-", ms=3,
                color=f"C{i}", label=f"rate {rate}",
            )  # fmt: skip
            if (plain := watched[-1].plain.get(rate)) is not None:
                axis.axhline(plain, color=f"C{i}", ls="--", lw=1, alpha=0.6)
        dashed = ", dashed: plain" if watched[-1].plain else ""
        axis.set(xlabel="step", ylabel=watched[-1].name, title=f"on unseen pictures{dashed}")
        axis.legend(fontsize=8)
    for axis in (left, *right):
        axis.grid(alpha=0.3)
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=110)
    plt.close(figure)
    replace_file(path, drawn.getvalue())


def plot_search(evidence: dict[str, Any], folder: Path) -> None:
    """Write `search.svg` and `.png`: the KL of a ladder's rungs against their multiply-adds."""
    rows = evidence["rows"][1:]
    figure, axis = plt.subplots(figsize=(4.8, 3.6), layout="constrained")
    shares = [row["share"] for row in rows]
    axis.plot(shares, [row["kl"] for row in rows], "o-", ms=4, label="pictures that judge")
    axis.plot(shares, [row["kl_search"] for row in rows], "o--", ms=3, lw=1, label="searched on")
    axis.set(xlabel="share of rung 0's multiply-adds", ylabel="KL to rung 0 (nats)", yscale="log")
    axis.invert_xaxis()
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    result = {"model": evidence["architecture"], "pictures": {"name": "unseen pictures"}}
    save(figure, result, folder / "search")


def plot_compare(result: dict[str, Any], folder: Path) -> None:
    """Write `compare.svg` and `.png`: KL by multiply-adds, a line a method, a star a budget."""
    figure, axis = plt.subplots(figsize=(7, 4.6), layout="constrained")
    rows = {(row["name"], row["rung"], row["bank"]): row for row in result["rows"]}
    names = dict.fromkeys(name for name, _, _ in list(rows)[1:])
    for i, name in enumerate(names):
        for bank in (False, True):
            line = sorted(
                (row["gmacs"], row["kl"])
                for row in result["rows"]
                if row["name"] == name and row["bank"] == bank
            )
            if not line:
                continue
            form = "s--" if name == "smaller pictures" else "D-" if bank else "o-"
            axis.plot(
                *zip(*line, strict=True), form, ms=4, lw=2 if bank else 1.2,
                color=plt.get_cmap("tab20")(i % 20), label=f"{name} + bank" if bank else name,
            )  # fmt: skip
    best = sorted((row["gmacs"], row["kl"]) for row in result["rows"][1:] if row["best"])
    if best:
        axis.plot(
            *zip(*best, strict=True), color="black", lw=3, alpha=0.15, label="best at its cost"
        )
    for i, budget in enumerate(result["budgets"]):
        row = rows[tuple(budget["best"][key] for key in ("name", "rung", "bank"))]
        axis.plot(
            row["gmacs"], row["kl"], "k*", ms=11, label="" if i else "best for a budget",
        )  # fmt: skip
    axis.set(xlabel="GMACs an image", ylabel="KL to the stock model (nats)", yscale="log")
    axis.invert_xaxis()  # cheaper to the right
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7, ncols=2)
    save(figure, result, folder / "compare")


def plot_matrix(result: dict[str, Any], folder: Path) -> None:
    """Write `matrix.svg` and `.png`: what the bank changes from plain, source by target."""
    measures = _measured(result)
    figure, axes = plt.subplots(
        1, len(measures), figsize=(4.4 * len(measures), 4), layout="constrained"
    )
    for axis, measure in zip(axes, measures, strict=True):
        title, colours, form = _CHANGES[measure]
        sources, targets, cells = changes(result, measure)
        bound = np.nanmax(np.abs(cells), initial=1e-9)
        image = axis.imshow(cells, cmap=colours, vmin=-bound, vmax=bound, aspect="auto")
        axis.set_facecolor("lightgrey")  # of cells that have no change: source = target
        axis.set_xticks(range(len(targets)), targets)
        axis.set_yticks(range(len(sources)), sources)
        axis.set(xlabel="rate", ylabel="source", title=f"{title}, bank against plain")
        if max(cells.shape) <= _ANNOTATED:
            for (i, j), change in np.ndenumerate(cells):
                if not np.isnan(change):
                    dark = abs(change) > 0.6 * bound
                    axis.text(
                        j, i, form.format(change), ha="center", va="center", fontsize=8,
                        color="white" if dark else "black",
                    )  # fmt: skip
        figure.colorbar(image, ax=axis)
    save(figure, result, folder / "matrix")


def changes(
    result: dict[str, Any], measure: str
) -> tuple[list[int], list[int], "np.ndarray[Any, np.dtype[np.float64]]"]:
    """Return the sources, the targets and what the bank changes, NaN where nothing.

    KL changes relative to plain, in percent; the others in percentage points.
    """
    sources = sorted({row["source"] for row in result["rows"]})
    targets = sorted({row["target"] for row in result["rows"]})
    cells = np.full((len(sources), len(targets)), np.nan)
    for row in result["rows"]:
        if "bank" not in row:
            continue
        plain, bank = row["plain"][measure], row["bank"][measure]
        place = sources.index(row["source"]), targets.index(row["target"])
        if measure != "kl":
            cells[place] = bank - plain
        elif plain > 0:
            cells[place] = 100 * (bank / plain - 1)
    return sources, targets, cells


def _measured(result: dict[str, Any]) -> list[str]:
    return [measure for measure in _MEASURES if measure in result["rows"][0]["plain"]]


def save(figure: Figure, result: dict[str, Any], path: Path) -> None:
    """Write a figure as `.svg` and `.png`, under the names of the model and of the pictures."""
    figure.suptitle(f"{result['model']} on {result['pictures']['name']}", fontsize=11)
    for suffix in ("svg", "png"):
        figure.savefig(path.with_suffix(f".{suffix}"), dpi=130)
    plt.close(figure)
