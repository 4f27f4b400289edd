"""Which rate an image runs at when its request leaves that to the server (`rate=auto`).

The lowest rate, which is the best answer, with which the most urgent image keeps its time, what
waits is served in time, and no more work arrives than can be done. Up at once, down only when no
higher rate was needed for a while. The idea of choosing by the slack of the most urgent request
is SlackFit's (SuperServe, NSDI 2025).

Knows nothing of threads, clocks or models: times are arguments, in seconds.
"""

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from server.engine.times import Flow, ServiceTimes, largest_batch

#: Share of the time left that is planned with; the rest is for what cannot be foreseen.
MARGIN = 0.8
#: Share of the time that may be planned as busy: close to 1 queues grow without bound.
LOAD = 0.9
#: Seconds for which the highest rate that was needed is kept.
HOLD = 1.0


@dataclass(frozen=True)
class Decision:
    """The rate of a batch and why: `quality` is the lowest that is allowed.

    The others name what asked for a higher one: the `deadline` of the most urgent image, the
    `backlog`, the `load` that arrives, or one of these a moment ago (`cooling`).
    """

    rate: int
    reason: str


class Controller:
    """Chooses rates for one model. Its memory is what was needed over the last `HOLD` seconds.

    What a request asks for decides its own rate alone: the memory leaves out the bounds of
    requests, and deadlines that are shorter than the server's own.
    """

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

    @property
    def need(self) -> int:
        """The highest rate that was needed of late."""
        return self._needs[0][1] if self._needs else 0

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
        self,
        low: int,
        high: int,
        waiting: Sequence[tuple[float, float]],
        elsewhere: "Elsewhere",
        now: float,
    ) -> Decision:
        """Choose the rate of the next batch.

        Args:
            low, high: the range of rates that is allowed.
            waiting: when each image that waits arrived and is due, the most urgent first.
            elsewhere: what else the device has to do.
            now: the time.
        """
        dues = [due for _, due in waiting]
        needed, reason = self._needed(low, high, dues, elsewhere, now)
        usual = [max(due, arrived + self.slo) for arrived, due in waiting]
        self._remember(self._needed(0, high, usual, elsewhere, now)[0], now)
        held = min(high, self.need)
        self.rate = max(needed, held)
        return Decision(self.rate, reason if held <= needed else "cooling")

    def _remember(self, needed: int, now: float) -> None:
        while self._needs and self._needs[-1][1] <= needed:
            self._needs.pop()
        self._needs.append((now, needed))
        while self._needs[0][0] < now - HOLD:
            self._needs.popleft()

    def _needed(
        self, low: int, high: int, dues: Sequence[float], elsewhere: "Elsewhere", now: float
    ) -> tuple[int, str]:
        """Return the lowest rate in the range that will do, and why `low` will not."""
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
