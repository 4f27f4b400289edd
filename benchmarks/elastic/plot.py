"""A plot of what `serve_elastic` measured in its steps: load, rate and latency over time."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # files only: no display is needed

import matplotlib.pyplot as plt


def plot(result: dict[str, Any], folder: Path) -> None:
    """Write `elastic.svg` and `.png`, of the first round."""
    trace = result["traces"]["steps"]
    auto, stock = trace["series"]["auto"], trace["series"]["rate 0"]
    begins, ends = trace["burst"]
    seconds = range(len(auto["offered"]))
    figure, (load, rate, latency) = plt.subplots(
        3, 1, figsize=(8, 7), sharex=True, layout="constrained"
    )

    load.plot(seconds, auto["offered"], color="0.6", label="offered")
    load.plot(seconds, auto["good"], color="C0", label="in time, auto")
    load.plot(seconds, stock["good"], color="C1", label="in time, rate 0")
    capacities = list(result["capacity"].items())
    for at, capacity in (capacities[0], capacities[-1]):
        load.axhline(capacity, color="0.4", lw=0.8, ls=":")
        load.annotate(f"capacity at rate {at}", (0, capacity), fontsize=8, va="bottom")
    load.set(ylabel="images/s", ylim=(0, 1.3 * max(auto["offered"])))

    rate.plot(seconds, _gaps(auto["rate"]), color="C0", label="auto")
    rate.set(ylabel="mean rate of answers")

    for name, line, colour in (("auto", auto, "C0"), ("rate 0", stock, "C1")):
        latency.plot(seconds, _gaps(line["worst_ms"]), color=colour, label=f"{name}, slowest")
        latency.plot(seconds, _gaps(line["p50_ms"]), color=colour, ls="--", label=f"{name}, median")
    latency.axhline(result["slo_ms"], color="0.4", lw=0.8, ls=":")
    latency.annotate("wanted within", (0, result["slo_ms"]), fontsize=8, va="bottom")
    latency.set(ylabel="ms of answers", xlabel="seconds", ylim=(0, 1.4 * result["slo_ms"]))

    for axis in (load, rate, latency):
        axis.axvspan(begins, ends, color="0.93", zorder=0)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8, loc="upper right", ncols=4)
    for suffix in ("svg", "png"):
        figure.savefig(folder / f"elastic.{suffix}", dpi=130)
    plt.close(figure)


def _gaps(values: list[float | None]) -> list[float]:
    return [float("nan") if value is None else value for value in values]
