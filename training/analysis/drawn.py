"""Plots of an analysis."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from training.analysis.pairs import KINDS, MEASURES
from training.plot import save

_COLUMNS = 4


def plot_proxies(result: dict[str, Any], folder: Path) -> None:
    """Write `analysis.svg` and `.png`: the difference in accuracy against each measure."""
    there = [name for name in MEASURES if any(row["measure"] == name for row in result["proxies"])]
    lines = -(-len(there) // _COLUMNS)
    figure = Figure(figsize=(3 * _COLUMNS, 2.6 * lines), layout="constrained")
    axes = figure.subplots(lines, _COLUMNS, squeeze=False)
    what = "top-1" if "top1" in result["rows"][0] else "agreement"
    for axis, measure in zip(axes.flat, there, strict=False):
        for i, kind in enumerate(KINDS):
            points = [
                (value, pair["difference"])
                for pair in result["pairs"]
                if pair["kind"] == kind and (value := pair["measures"].get(measure)) is not None
            ]
            if points:
                axis.plot(*zip(*points, strict=True), "o", ms=3, color=f"C{i}", label=kind)
        axis.set(xlabel=MEASURES[measure], ylabel=f"{what} differs, points")
        axis.grid(alpha=0.3)
    for axis in axes.flat[len(there) :]:
        axis.set_axis_off()
    axes[0, 0].legend(fontsize=7)
    save(figure, result, folder / "analysis")


def plot_depth(result: dict[str, Any], folder: Path) -> None:
    """Write `depth.svg` and `.png`: how far patches come as tokens of their own, a map each."""
    rows = [row for row in result["rows"] if row["rung"]]
    lines = -(-len(rows) // _COLUMNS)
    figure = Figure(figsize=(2.6 * _COLUMNS, 2.5 * lines), layout="constrained")
    axes = figure.subplots(lines, _COLUMNS, squeeze=False)
    highest = max(np.max(row["depth"]) for row in result["rows"])
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, row in zip(axes.flat, rows, strict=False):
        image = axis.imshow(row["depth"], cmap="viridis", vmin=0, vmax=highest)
        bank = " + bank" if row["bank"] else ""
        axis.set_title(f"{row['method']}{bank}, rung {row['rung']}\n{row['model']}", fontsize=8)
    figure.colorbar(image, ax=axes, label="blocks as a token of its own", shrink=0.6)
    save(figure, result, folder / "depth")
