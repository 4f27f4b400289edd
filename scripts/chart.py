"""Draw the chart of the README from measured results: accuracy against compute.

    python -m scripts.chart

One pair of lines: the bundled model on its ladder with its bank, and DeiT-Ti with r tokens merged
in every block, as Token Merging does it. Above each of our points is what an image takes, compiled.
"""

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # files only: no display is needed

import matplotlib.pyplot as plt

DOCS = Path(__file__).parents[1] / "docs"
OURS, MERGING = "#1a56db", "#8a8f98"


def rows(result: str) -> list[dict[str, Any]]:
    """Return the rows of an evaluation from source rate 0, and rate 0 itself first."""
    said = json.loads((DOCS / "results" / result / "evaluation.json").read_text(encoding="utf-8"))
    return [row for row in said["rows"] if row["source"] == 0]


def main() -> None:
    """Write docs/images/elastic.svg."""
    plt.rcParams["svg.hashsalt"] = "tocom"  # the same file from the same figures
    ours, merging = rows("deit_tiny_half"), rows("deit_tiny_imagenet")
    times = json.loads((DOCS / "results/deit_tiny_half/compare.json").read_text(encoding="utf-8"))
    ms = {
        row["rung"]: row["ms"]["compiled x1"]
        for row in times["rows"]
        if row["name"] in ("stock", "half")
    }
    figure, axis = plt.subplots(figsize=(7.2, 3.4), layout="constrained")
    for points, measure, colour, name, at in (
        (merging, "plain", MERGING, "Token Merging, r in every block", (59.5, 78.2)),
        (ours, "bank", OURS, "ToCom Serve: searched ladder and bank", (62, 83.4)),
    ):
        stock = points[0]["gmacs"]
        x = [100 * row["gmacs"] / stock for row in points]
        y = [row.get(measure, row["plain"])["top1"] for row in points]
        axis.plot(x, y, "o-", color=colour, lw=2.2 if colour == OURS else 1.6)
        axis.text(*at, name, color=colour, ha="right", weight="bold")
        if colour == OURS:
            for row, left, top in zip(points, x, y, strict=True):
                axis.annotate(
                    f"{ms[row['target']]:.1f} ms", (left, top), (0, 9),
                    textcoords="offset points", ha="center", fontsize=8.5, color=colour,
                )  # fmt: skip
    axis.set(xlim=(103, 46), ylim=(76, 84.5))
    axis.set_xlabel("multiply-adds of the stock model, %")
    axis.set_ylabel("top-1 accuracy, %")
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", alpha=0.25)
    figure.savefig(DOCS / "images" / "elastic.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
