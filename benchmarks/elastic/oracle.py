"""What a server could reach that knew all arrivals beforehand: a bound to measure policies by.

One machine runs batch after batch, each at one rate. Every request has the same time to be
answered, and the answers of a rate are worth the same whoever asks. Then it costs nothing to run
those that are answered in the order in which they came, and to fill a batch with requests that
came one after the other: of two that change places, the later one was there, and the earlier one
had its place within its own time. So it is enough to decide, request by request in this order,
whether to drop it or to begin a batch with it, of which size and at which rate; the best way on
depends on nothing but the next request and the time at which the machine is free. That is solved
by going through the requests once, over a grid of times.

It is a bound from above, not a schedule to be had: decoding and HTTP take no time of their own,
batches take their median time and never more, and times are rounded down to the grid.
"""

from collections.abc import Callable, Sequence

import numpy as np


def best(
    arrivals: Sequence[float],
    slo: float,
    worth: Sequence[float],
    seconds: Callable[[int, int], float],
    max_batch: int,
    grid: float = 0.001,
) -> float:
    """Return the most that the answers can be worth, in the mean over all requests.

    Args:
        arrivals: seconds, ascending.
        slo: seconds in which each is to be answered.
        worth: of an answer in time, at index r at rate r.
        seconds: that a batch of so many images takes at a rate.
        max_batch: images in a batch.
        grid: seconds to which times are rounded down.
    """
    # Ticks after an arrival at which the machine may be free: later, that request is lost. One
    # more than fit, since both times of a difference were rounded.
    span = int(slo / grid) + 2
    at = np.floor(np.asarray(arrivals) / grid).astype(int)
    ticks = {
        (rate, size): int(seconds(rate, size) / grid)
        for rate in range(len(worth))
        for size in range(1, max_batch + 1)
    }
    nothing = -np.inf
    # value[i][t]: the most that requests before i are worth if the machine is free t ticks after
    # i arrives, or sooner.
    value = np.full((len(at) + 1, span), nothing)
    value[0] = 0.0
    after = [*at, at[-1] + span]
    for i in range(len(at)):
        value[i] = np.maximum.accumulate(value[i])
        _reach(value[i + 1], value[i], after[i] - after[i + 1])
        for size in range(1, min(max_batch, len(at) - i) + 1):
            last = at[i + size - 1] - at[i]  # until then the batch waits
            if last >= span:
                break
            for rate, each in enumerate(worth):
                ends = last + ticks[rate, size]
                if ends >= span:
                    continue
                # From when it is free, to when it is free again.
                free = np.full(span, nothing)
                free[ends] = value[i][last]
                free[ends + 1 :] = value[i][last + 1 : span - ticks[rate, size]]
                _reach(value[i + size], free + size * each, after[i] - after[i + size])
    return float(value[-1].max()) / len(at)


def _reach(value: "np.ndarray", found: "np.ndarray", shift: int) -> None:
    """Take over what is better, of times that are counted from another arrival."""
    span = len(value)
    if shift <= -span:
        value[0] = max(value[0], found.max())
        return
    if shift:
        # What was free before this arrival is free at it.
        value[0] = max(value[0], found[: -shift + 1].max())
        np.maximum(value[1 : span + shift], found[-shift + 1 :], out=value[1 : span + shift])
    else:
        np.maximum(value, found, out=value)
