"""In which order is measured, and what comes of it: medians, percentiles, intervals, slopes."""

import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Statistic = Callable[[Floats], Floats]
T = TypeVar("T")


def in_turn(items: Iterable[T], turn: int) -> list[T]:
    """Return what a turn measures, in its order: every other turn begins at the end.

    Each finds caches, clock and memory as the one before left them, so none is always first.
    """
    return list(items)[:: -1 if turn % 2 else 1]


def spread(values: Sequence[float], form: str = ".2f") -> str:
    """Return the median and, in brackets, the lowest and the highest value."""
    if len(values) == 1:
        return f"{values[0]:{form}}"
    median = statistics.median(values)
    return f"{median:{form}} ({min(values):{form}} to {max(values):{form}})"


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """Return the ratio of each pair of measurements that were taken side by side."""
    return [one / other for one, other in zip(ours, theirs, strict=True)]


def percentile(percent: float) -> Statistic:
    """Return the function that takes a percentile along the last axis."""
    return lambda values: np.asarray(np.percentile(values, percent, axis=-1))


def mean(values: Floats) -> Floats:
    """Return the mean along the last axis."""
    return np.asarray(values.mean(axis=-1))


def interval(
    values: ArrayLike, statistic: Statistic, block: int = 50, draws: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """Return the 95 % confidence interval of a statistic of consecutive requests.

    A circular block bootstrap: requests that follow each other share their queue, and drawing
    them one by one would make the interval too narrow.

    Args:
        values: one for each request, in their order.
        statistic: of values [..., N] along the last axis.
        block: consecutive requests that are drawn together.
        draws: how often N requests are drawn.
        seed: of the draws.
    """
    series = np.asarray(values, dtype=np.float64)
    block = min(block, len(series))
    starts = np.random.default_rng(seed).integers(
        0, len(series), size=(draws, -(-len(series) // block))
    )
    drawn = (starts[:, :, None] + np.arange(block)).reshape(draws, -1)[:, : len(series)]
    found = statistic(series[drawn % len(series)])
    low, high = np.percentile(found, [2.5, 97.5])
    return float(low), float(high)


def slope(times: Sequence[float], values: Sequence[float]) -> tuple[float, float]:
    """Return the slope of the line of least squares and its standard error."""
    x, y = np.asarray(times, dtype=np.float64), np.asarray(values, dtype=np.float64)
    x = x - x.mean()
    found = float(x @ y / (x @ x))
    left = y - y.mean() - found * x
    return found, float(np.sqrt(left @ left / (len(x) - 2) / (x @ x)))


def markdown(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)
