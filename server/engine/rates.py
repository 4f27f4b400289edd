"""Which rate an image runs at when its request leaves that to the server (`rate=auto`).

The lowest rate, which is the best answer, with which the most urgent image keeps its time, what
waits is served in time, and no more work arrives than can be done. Up at once, down only when no
higher rate was needed for a while. The idea of choosing by the slack of the most urgent request
is SlackFit's (SuperServe, NSDI 2025).

Knows nothing of threads, clocks or models: times are arguments, in seconds.
"""

import itertools
import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

#: Share of the time left that is planned with; the rest is for what cannot be foreseen.
MARGIN = 0.8
#: Share of the time that may be planned as busy: close to 1 queues grow without bound.
LOAD = 0.9
#: Seconds for which the highest rate that was needed is kept.
HOLD = 1.0
#: A batch takes at most this share of its most urgent image's whole time: who comes while it
#: runs still has most of theirs.
SLICE = 1 / 3


class ServiceTimes:
    """How long a batch takes at each rate: measured before serving, kept current while serving.

    Each measurement moves its own cell a little and the pace of all cells more: a machine that
    slows down slows down at every rate, also at those that do not run just now.
    """

    def __init__(self, macs: Callable[[int], int]) -> None:
        """Know nothing yet but what an image costs.

        Args:
            macs: returns the multiply-adds of an image at a rate. What was never measured is
                taken from what was, in proportion to them.
        """
        self._macs = macs
        self._cells: dict[tuple[int, int], float] = {}
        self._pace = 1.0

    def measured(self, rate: int, images: int, seconds: float) -> None:
        """Take note of a batch that ran."""
        if seconds <= 0:  # too short for the clock: says nothing of the ratio
            return
        key = rate, _bucket(images)
        # A bucket's cell is for a full one.
        seconds *= key[1] / images
        if key not in self._cells:
            self._cells[key] = seconds / self._pace
            return
        ratio = seconds / (self._cells[key] * self._pace)
        self._pace *= ratio**0.2
        self._cells[key] *= ratio**0.1

    def settle(self, rates: Sequence[int], sizes: Sequence[int]) -> None:
        """Keep what is expected of batches that were not measured.

        It shall not follow from another rate any more, which may become faster by itself.
        """
        for rate, images in itertools.product(rates, sizes):
            key = rate, _bucket(images)
            self._cells[key] = self._cell(*key) / self._pace

    def forget(self, rate: int) -> list[int]:
        """Forget a rate, which has become faster by itself; return the sizes that were known."""
        sizes = [size for known, size in self._cells if known == rate]
        for size in sizes:
            del self._cells[rate, size]
        return sizes

    def batch(self, rate: int, images: int) -> float:
        """Return the seconds to expect of a batch; 0 before anything was measured."""
        bucket = _bucket(images)
        return self._cell(rate, bucket) * images / bucket

    def image(self, rate: int, batch: int) -> float:
        """Return the seconds to expect of an image among `batch`."""
        return self.batch(rate, batch) / batch

    def _cell(self, rate: int, bucket: int) -> float:
        if not self._cells:
            return 0.0
        found = self._cells.get((rate, bucket))
        if found is None:
            other, size = min(
                self._cells,
                key=lambda cell: (abs(math.log2(cell[1] / bucket)), abs(cell[0] - rate)),
            )
            scale = bucket * self._macs(rate) / (size * self._macs(other))
            found = self._cells[other, size] * scale
        return found * self._pace


class Flow:
    """How much arrives a second, of late: images, or seconds of work."""

    def __init__(self) -> None:
        self._amount = 0.0
        self._at = -math.inf

    def add(self, amount: float, now: float, window: float) -> None:
        """Take note of an arrival; it counts less and less over some `window` seconds."""
        self._amount = self._left(now, window) + amount
        self._at = now

    def rate(self, now: float, window: float) -> float:
        """Return the amount a second."""
        return self._left(now, window) / window

    def _left(self, now: float, window: float) -> float:
        return self._amount * math.exp((self._at - now) / window)


@dataclass(frozen=True)
class Decision:
    """The rate of a batch and why: `quality` is the lowest that is allowed.

    The others name what asked for a higher one: the `deadline` of the most urgent image, the
    `backlog`, the `load` that arrives, or one of these a moment ago (`cooling`).
    """

    rate: int
    reason: str


class Controller:
    """Chooses rates for one model. Its memory is what was needed over the last `HOLD` seconds."""

    def __init__(self, times: ServiceTimes, max_batch: int, slo: float = math.inf) -> None:
        """Begin at rate 0.

        Args:
            times: of the model.
            max_batch: images in a batch.
            slo: seconds in which answers are wanted.
        """
        self.times = times
        self.max_batch = max_batch
        self.slo = slo
        self.arrivals = Flow()
        self.rate = 0  # the last one chosen
        self._needs: deque[tuple[float, int]] = deque()  # falling rates, the highest first

    def window(self) -> float:
        """Return over how many seconds arrivals are counted: one image must not look like load."""
        return max(0.5, 10 * self.times.batch(0, 1))

    def arrived(self, now: float) -> None:
        """Take note of an image that is to run at a rate of our choice."""
        self.arrivals.add(1, now, self.window())

    def load(self, rate: int, now: float) -> float:
        """Return the share of the time that what arrives for us takes at `rate`."""
        return self.arrivals.rate(now, self.window()) * self.seconds(rate, self.max_batch)

    def seconds(self, rate: int, waiting: int) -> float:
        """Return the seconds to expect of an image where so many wait, in the batches they make."""
        size = largest_batch(self.times, rate, waiting, self.max_batch, self.slo, self.slo)
        return self.times.image(rate, size)

    def choose(
        self, low: int, high: int, dues: Sequence[float], elsewhere: "Elsewhere", now: float
    ) -> Decision:
        """Choose the rate of the next batch.

        Args:
            low, high: the range of rates that is allowed.
            dues: when each image that waits is due, the most urgent first.
            elsewhere: what else the device has to do.
            now: the time.
        """
        needed, reason = self._needed(low, high, dues, elsewhere, now)
        while self._needs and self._needs[-1][1] <= needed:
            self._needs.pop()
        self._needs.append((now, needed))
        while self._needs[0][0] < now - HOLD:
            self._needs.popleft()
        held = min(high, self._needs[0][1])
        self.rate = max(needed, held)
        return Decision(self.rate, reason if held <= needed else "cooling")

    def _needed(
        self, low: int, high: int, dues: Sequence[float], elsewhere: "Elsewhere", now: float
    ) -> tuple[int, str]:
        first, last = (MARGIN * (due - now) for due in (dues[0], max(dues[0], dues[-1])))
        waiting = len(dues)
        reason = "quality"
        for rate in range(low, high + 1):
            if self.times.batch(rate, 1) > first:
                why = "deadline"
            elif elsewhere.seconds + waiting * self.seconds(rate, waiting) > last:
                why = "backlog"
            elif elsewhere.load + self.load(rate, now) > LOAD:
                why = "load"
            else:
                return rate, reason
            if rate == low:
                reason = why
        return high, reason


@dataclass(frozen=True)
class Elsewhere:
    """What a device has to do beside the images that a rate is chosen for.

    Attributes:
        seconds: of work that waits.
        load: share of the time that other arrivals take.
    """

    seconds: float = 0.0
    load: float = 0.0


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
    if slack > times.batch(rate, 1):
        allowed = min(allowed, slack)
    size = min(waiting, limit)
    while size > 1 and times.batch(rate, size) > allowed:
        size = max(1, size // 2)
    return size


def _bucket(images: int) -> int:
    """Return the power of two that a batch is counted under."""
    return 1 << (images - 1).bit_length()
