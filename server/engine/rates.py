"""Which rate an image runs at when its request leaves that to the server (`rate=auto`).

The lowest rate, which is the best answer, with which the most urgent image keeps its time, what
waits is served in time, and what waits soon, if images go on to arrive as they do, will be well
within its time. A higher rate costs an answer little and being late costs all of it, so rates rise
while there still is time left. Arrivals are counted when images are asked for, so that a burst is
met by the first batch that begins in it. Up at once, down when no higher rate was needed for a
moment.

Choosing by what time is left is SlackFit's idea (SuperServe, NSDI 2025), which `slackfit` has as
it was published. Knows nothing of threads, clocks or models: times are arguments, in seconds.
"""

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from server.engine.times import Flow, ServiceTimes, largest_batch

#: Share of the time left that one batch may take; the rest is for what cannot be foreseen.
MARGIN = 0.6
#: Share of the time left that all that waits may take; the rest is for what comes meanwhile, too.
CROWD = 0.4
#: Share of the time that arrivals may take; by what they take beyond it, what waits grows.
FULL = 0.85
#: Whole times of an image for which arrivals are expected to go on as they do.
AHEAD = 2.0
#: Share of its whole time in which an image that comes then is to be served.
AIM = 0.3
#: Seconds for which the highest rate that was needed is kept.
HOLD = 0.2


class Decision(NamedTuple):
    """The rate of a batch and why: `quality` is the lowest that is allowed.

    The others name what asked for a higher one: the `deadline` of the most urgent image, the
    `backlog`, the `load` that arrives, or one of these a moment ago (`cooling`). `images` says how
    many are to run; None: as many as the scheduler finds right.
    """

    rate: int
    reason: str
    images: int | None = None


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
        self._arrivals = Flow()
        self.rate = 0  # the last one chosen
        self._needs: deque[tuple[float, int]] = deque()  # falling rates, the highest first

    @property
    def need(self) -> int:
        """The highest rate that was needed of late."""
        return self._needs[0][1] if self._needs else 0

    @property
    def window(self) -> float:
        """Over how many seconds arrivals are counted: one image must not look like load."""
        return max(0.25, 10 * self.times.batch(0, 1))

    def arrived(self, images: int, now: float) -> None:
        """Take note of images that were to run at a rate of our choice."""
        self._arrivals.add(images, now, self.window)

    def load(self, rate: int, now: float) -> float:
        """Return the share of the time that what arrives for us takes at `rate`."""
        return self._arrivals.rate(now, self.window) * self.seconds(rate, self.max_batch)

    def size(self, rate: int, waiting: int) -> int:
        """Return of how many images the batches are that so many make."""
        return largest_batch(self.times, rate, waiting, self.max_batch, self.slo, self.slo)

    def seconds(self, rate: int, waiting: int) -> float:
        """Return the seconds to expect of an image where so many wait, in the batches they make."""
        return self.times.image(rate, self.size(rate, waiting))

    def choose(
        self,
        low: int,
        high: int,
        waiting: Sequence[tuple[float, float]],
        elsewhere: "Elsewhere",
        now: float,
        coming: Sequence[tuple[float, float]] = (),
    ) -> Decision:
        """Choose the rate of the next batch.

        Args:
            low, high: the range of rates that is allowed.
            waiting: when each image that waits arrived and is due, the most urgent first.
            elsewhere: what else the device has to do.
            now: the time.
            coming: as `waiting`, of those that were asked for and are not prepared yet.
        """
        needed, reason = self._needed(low, high, waiting, coming, elsewhere, now)
        usual, usually_coming = (
            [(arrived, max(due, arrived + self.slo)) for arrived, due in images]
            for images in (waiting, coming)
        )
        self._remember(self._needed(0, high, usual, usually_coming, elsewhere, now)[0], now)
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
        self,
        low: int,
        high: int,
        waiting: Sequence[tuple[float, float]],
        coming: Sequence[tuple[float, float]],
        elsewhere: "Elsewhere",
        now: float,
    ) -> tuple[int, str]:
        """Return the lowest rate in the range that will do, and why `low` will not."""
        images = [*waiting, *coming]
        arrived, due = max(images, key=lambda image: image[1])
        first, last, whole = waiting[0][1] - now, due - now, due - arrived
        alone = len(images) == 1 and not elsewhere.seconds
        reason = "quality"
        for rate in range(low, high + 1):
            seconds = elsewhere.seconds + len(images) * self.seconds(rate, len(images))
            grows = max(0.0, elsewhere.load + self.load(rate, now) - FULL)
            if self.times.batch(rate, 1) > MARGIN * first:
                why = "deadline"
            elif not alone and seconds > CROWD * last:
                why = "backlog"
            elif grows and seconds + AHEAD * whole * grows > AIM * whole:
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
