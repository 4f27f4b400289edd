"""Plots of evaluations: quality against compute, with and without the bank."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # files only: no display is needed

import matplotlib.pyplot as plt

_MEASURES = (
    ("kl", "KL to the source rate (nats)"),
    ("agreement", "agreement with the source rate (%)"),
    ("top1", "top-1 (%)"),
)


def plot_evaluation(result: dict[str, Any], folder: Path) -> None:
    """Write `evaluation.svg` and `.png`: each measure against GMACs, a colour a source."""
    sources = sorted({row["source"] for row in result["rows"]})
    figure, axes = plt.subplots(1, len(_MEASURES), figsize=(12, 3.6), layout="constrained")
    for axis, (measure, label) in zip(axes, _MEASURES, strict=True):
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
        axis.set(xlabel="GMACs an image", ylabel=label)
        axis.invert_xaxis()  # cheaper to the right, as the rate grows
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    figure.suptitle(f"{result['model']} on {result['pictures']['name']}", fontsize=11)
    for suffix in ("svg", "png"):
        figure.savefig(folder / f"evaluation.{suffix}", dpi=130)
    plt.close(figure)
