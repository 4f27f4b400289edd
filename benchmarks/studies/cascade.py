"""What a cascade comes to on pictures that it was not calibrated on, beside its fixed rungs.

    python -m benchmarks.studies.cascade PICTURES [--limit N]
    python -m benchmarks.studies.cascade --plot

The bundled model with its bank. All pictures run at all rungs once; what each point of its
`cascade.json` comes to is counted from these answers, which is what a server gives for them. Writes
`docs/results/deit_tiny_cascade/cascade.json` and, from it, `docs/images/cascade.svg`.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # files only: no display is needed

import matplotlib.pyplot as plt

from adapters.cascade import Cascade, read_cascade
from tocom import bundled_folder
from training.cascade.calibrate import Calibrated
from training.cascade.chains import Runs
from training.cascade.config import CascadeConfig

DOCS = Path(__file__).parents[2] / "docs"
RESULT = DOCS / "results" / "deit_tiny_cascade" / "cascade.json"
OURS, FIXED = "#1a56db", "#8a8f98"


def described(cascade: Cascade, runs: Runs, pictures: str) -> dict[str, Any]:
    """Return what rungs and points come to."""
    count = len(runs.agree)
    return {
        "pictures": {"name": pictures, "count": count},
        "calibrated_on": cascade.pictures,
        "rungs": [
            {
                "rate": rate,
                "share": round(share, 4),
                "agreement": round(int(runs.agree[:, run].sum()) / count, 4),
            }
            for run, (rate, share) in enumerate(zip(runs.rates, runs.shares, strict=True))
        ],
        "cascade": [
            {
                "asked": point.agreement,
                "rates": point.rates,
                "share": round(measured.share, 4),
                "agreement": round(measured.agreement, 4),
            }
            for point in cascade.points
            for measured in [runs.measure(point)]
        ],
    }


def plot(result: dict[str, Any], path: Path) -> None:
    """Draw what asking by rate, budget, auto and cascade gives."""
    plt.rcParams["svg.hashsalt"] = "tocom"  # the same file from the same figures
    figure, axis = plt.subplots(figsize=(7.2, 3.8), layout="constrained")
    x, y = ([100 * row[key] for row in result["rungs"]] for key in ("share", "agreement"))
    axis.plot(x, y, "-", color=FIXED, lw=9, alpha=0.25, solid_capstyle="round")
    axis.plot(x, y, "o", color=FIXED, ms=7)
    axis.step(x, y, where="post", color=FIXED, lw=1, ls=":")
    for row, left, top in zip(result["rungs"], x, y, strict=True):
        axis.annotate(
            f"rate={row['rate']}", (left, top), (6, -12), textcoords="offset points", color=FIXED,
            fontsize=9,
        )  # fmt: skip
    x, y = ([100 * row[key] for row in result["cascade"]] for key in ("share", "agreement"))
    axis.plot(x, y, "o-", color=OURS, ms=4, lw=2.2, label="rate=cascade, each picture its own")
    axis.plot([], [], "o", color=FIXED, ms=7, label="rate=R, for every picture")
    axis.plot([], [], ":", color=FIXED, lw=1, label="budget=B: the best rung within B")
    axis.plot([], [], color=FIXED, lw=9, alpha=0.25, label="rate=auto: along the rungs, by load")
    axis.set_xlabel("mean multiply-adds of the stock model, %")
    axis.set_ylabel("answered as at rate 0, %")
    axis.legend(loc="lower right", fontsize=9, frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.25)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, unless only the plot is wanted, and draw."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("pictures", nargs="?", help="a .tar or a folder of pictures")
    parser.add_argument("--limit", type=int, help="so many pictures (default: all)")
    parser.add_argument("--plot", action="store_true", help="draw what was measured before")
    arguments = parser.parse_args(argv)
    if not arguments.plot:
        if arguments.pictures is None:
            parser.error("PICTURES are needed, or --plot")
        config = CascadeConfig.model_validate(
            {
                "backbone": {"name": "bundled:deit_tiny"},
                "bank": "bundled:deit_tiny_bank",
                "pictures": arguments.pictures,
                "limit": arguments.limit,
            }
        )
        cascade = read_cascade(bundled_folder("deit_tiny"))
        runs = Calibrated.open(config).run(config)
        said = described(cascade, runs, Path(arguments.pictures).name)
        RESULT.parent.mkdir(parents=True, exist_ok=True)
        RESULT.write_text(json.dumps(said, indent=1) + "\n", encoding="utf-8")
    plot(json.loads(RESULT.read_text(encoding="utf-8")), DOCS / "images" / "cascade.svg")


if __name__ == "__main__":
    main()
