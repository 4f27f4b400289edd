"""How long batches take and how much arrives: what rates and batch sizes are chosen by.

Knows nothing of threads, clocks or models: times are arguments, in seconds.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import NamedTuple, TypeAlias

#: A batch takes at most this share of its most urgent image's whole time: requests that arrive
#: while it runs still have most of theirs.
SLICE = 1 / 3
#: So many times as long as expected a batch may well take.
DELAY = 1.2
#: More than so many times as long as expected counts as this.
SWAY = 2.0


_Cell: TypeAlias = tuple[int, int]  # rate, bucket of images
_Sum: TypeAlias = list[tuple[_Cell, float]]  # cells and their weights


class _Table(NamedTuple):
    cells: Mapping[_Cell, float]  # seconds at pace 1
    pace: float
    estimates: dict[_Cell, _Sum]  # found so far for cells that are not there


class ServiceTimes:
    """How long a batch takes at each rate: measured before serving, kept current while serving.

    Each measurement moves its own cell a little and the pace of all cells more: a machine that
    slows down slows down at every rate, also at those that do not run just now.

    One thread writes, the one that runs batches; any thread reads. A change replaces the table as
    a whole, so a reader needs no lock.
    """

    def __init__(self, macs: Callable[[int], int]) -> None:
        """Know nothing yet but what an image costs.

        Args:
            macs: returns the multiply-adds of an image at a rate, always the same. A rate that was
                never measured takes its times from the nearest one, in proportion to them.
        """
        # Counting them walks through a whole model, and every image that arrives asks for them.
        self._macs = cache(macs)
        self._table = _Table({}, 1.0, {})

    def measured(self, rate: int, images: int, seconds: float) -> None:
        """Take note of a batch that ran."""
        if seconds <= 0:  # too short for the clock: says nothing of the ratio
            return
        cells, pace, estimates = self._table
        key = rate, _bucket(images)
        # A bucket's cell is for a full one.
        seconds *= key[1] / images
        if key not in cells:
            self._table = _Table({**cells, key: seconds / pace}, pace, {})
            return
        # By accident a batch is held up, and none is fast.
        ratio = min(seconds / (cells[key] * pace), SWAY)
        changed = {**cells, key: cells[key] * ratio**0.1}
        self._table = _Table(changed, pace * ratio**0.2, estimates)

    def settle(self, rates: Sequence[int], sizes: Sequence[int]) -> None:
        """Keep what is expected of batches that were not measured.

        From now on it does not follow from another rate, which may become faster by itself.
        """
        cells, pace, _ = self._table
        keys = [(rate, _bucket(images)) for rate, images in itertools.product(rates, sizes)]
        settled = {key: self._cell(*key) / pace for key in keys}
        self._table = _Table({**cells, **settled}, pace, {})

    def forget(self, rate: int) -> list[int]:
        """Forget a rate, which has changed by itself; return the sizes that were known."""
        cells, pace, _ = self._table
        others = {key: seconds for key, seconds in cells.items() if key[0] != rate}
        self._table = _Table(others, pace, {})
        return [size for known, size in cells if known == rate]

    def batch(self, rate: int, images: int) -> float:
        """Return the seconds to expect of a batch; 0 before anything was measured."""
        bucket = _bucket(images)
        return self._cell(rate, bucket) * images / bucket

    def image(self, rate: int, batch: int) -> float:
        """Return the seconds to expect of an image among `batch`."""
        return self.batch(rate, batch) / batch

    def saved(self, rate: int, images: int) -> float:
        """Return the seconds that one more image saves in a batch, instead of in one of its own."""
        together = self.batch(rate, images + 1)
        return self.batch(rate, images) + self.batch(rate, 1) - together

    def _cell(self, rate: int, bucket: int) -> float:
        cells, pace, estimates = self._table
        if not cells:
            return 0.0
        asked = rate, bucket
        if asked in cells:
            return cells[asked] * pace
        if asked not in estimates:
            estimates[asked] = self._estimate(asked, cells)
        return pace * sum(weight * cells[cell] for cell, weight in estimates[asked])

    def _estimate(self, asked: _Cell, cells: Mapping[_Cell, float]) -> _Sum:
        """Return what a cell that was not measured follows from.

        A batch has a part of its own and one for each image, so between two sizes that were
        measured its time is on the line through both.
        """
        rate, bucket = asked
        known = min((other for other, _ in cells), key=lambda other: (abs(other - rate), other))
        scale = self._macs(rate) / self._macs(known)
        sizes = [size for other, size in cells if other == known]
        below = max((size for size in sizes if size <= bucket), default=None)
        above = min((size for size in sizes if size >= bucket), default=None)
        if below is None or above is None or below == above:
            size = below or above
            assert size is not None  # a rate is known by a size
            return [((known, size), scale * bucket / size)]
        share = (bucket - below) / (above - below)
        return [((known, below), scale * (1 - share)), ((known, above), scale * share)]


class Flow:
    """How much arrives a second, of late: images, or seconds of work."""

    def __init__(self) -> None:
        self._amount = 0.0
        self._at = -math.inf

    def add(self, amount: float, now: float, window: float) -> None:
        """Take note of an arrival; it counts less and less over some `window` seconds."""
        self._amount = self.total(now, window) + amount
        self._at = now

    def rate(self, now: float, window: float) -> float:
        """Return the amount a second."""
        return self.total(now, window) / window

    def total(self, now: float, window: float) -> float:
        """Return the amount of the last `window` seconds, or so."""
        return self._amount * math.exp((self._at - now) / window)


def largest_batch(
    times: ServiceTimes, rate: int, waiting: int, limit: int, budget: float, slack: float
) -> int:
    """Return how many images to run at once.

    As many as wait, up to `limit`, if that takes no more than a `SLICE` of the most urgent one's
    whole time (`budget` seconds) and than it has left (`slack`). Where it is late already only
    the pace counts, which full batches are best for: small ones would make all others late too.
    """
    if slack <= 0:
        return min(waiting, limit)
    allowed = SLICE * budget
    if slack > DELAY * times.batch(rate, 1):
        allowed = min(allowed, slack / DELAY)
    size = min(waiting, limit)
    while size > 1 and (seconds := times.batch(rate, size)) > allowed:
        # Of one bucket, times go by images: those between take too long. One more, for rounding.
        fits = math.floor(size * allowed / seconds) + 1
        size = min(size - 1, max(fits, _bucket(size) // 2))
    return size


def sacrificed(
    times: ServiceTimes, rate: int, dues: Sequence[float], limit: int, budget: float, now: float
) -> int:
    """Return how many of the most urgent images the next batch is to leave behind.

    None, unless they have so little time left that only small batches would answer them, in which
    all images take too long for the last to be in time. Then as many as it takes for most of them
    to be, where time is worth as many answers as full batches give in it. Nexus (SOSP 2019) drops
    images early for the same reason.

    Args:
        times, rate: of the batches.
        dues: when the images that wait are due, in their order.
        limit: images in a batch.
        budget: the most urgent one's whole time.
        now: the time.
    """
    full = largest_batch(times, rate, len(dues), limit, budget, budget)
    size = largest_batch(times, rate, len(dues), limit, budget, dues[0] - now)
    if size >= full or len(dues) * times.image(rate, size) <= dues[-1] - now:
        return 0
    seen = dues[: 2 * limit]  # enough to compare, and it takes no longer however many wait

    def worth(left: int) -> float:
        """Return how many would be in time, less what full batches answer in as much time."""
        first, ends, answered = left, now, 0
        while first < len(seen):
            if (slack := seen[first] - ends) < DELAY * times.batch(rate, 1):
                first += 1
                continue
            size = largest_batch(times, rate, len(seen) - first, limit, budget, slack)
            first, ends, answered = first + size, ends + times.batch(rate, size), answered + size
        return answered - (ends - now) / times.image(rate, full)

    return max(range(min(len(seen), limit)), key=worth)


def _bucket(images: int) -> int:
    """Return the power of two that a batch is counted under."""
    return 1 << (images - 1).bit_length()
