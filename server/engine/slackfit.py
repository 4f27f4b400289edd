"""SlackFit, another way to choose rates: by the time that the most urgent image has left.

The range of times that batches take is cut into buckets of equal width, each with the largest
batch, of any rate, whose time falls into it. When a batch begins, the bucket just below what is
left to the most urgent image decides both its rate and its size. A burst makes images wait, and so
leaves them less time: nothing is foreseen, and nothing is kept. Here to be compared with.

Reference: SuperServe, arXiv:2312.16733, section 4.
"""

import itertools
from collections.abc import Sequence

from server.engine.rates import Controller, Decision, Elsewhere

#: Buckets that times are cut into.
BUCKETS = 10


class SlackFit(Controller):
    """See the module. It takes no account of arrivals, nor of what else the device has to do."""

    def choose(
        self,
        low: int,
        high: int,
        waiting: Sequence[tuple[float, float]],
        elsewhere: Elsewhere,
        now: float,
        coming: Sequence[tuple[float, float]] = (),
    ) -> Decision:
        """Choose rate and size of the next batch; arguments as of `Controller.choose`."""
        slack = waiting[0][1] - now
        batches = self._batches(low, high)
        _, rate, images = next((each for each in reversed(batches) if each[0] <= slack), batches[0])
        self.rate = rate
        return Decision(rate, "slack", min(images, len(waiting)))

    def _batches(self, low: int, high: int) -> list[tuple[float, int, int]]:
        """Return the batch of each bucket that has one: seconds, ascending, rate and images."""
        times = {
            (rate, images): self.times.batch(rate, images)
            for rate, images in itertools.product(
                range(low, high + 1), range(1, self.max_batch + 1)
            )
        }
        least, most = min(times.values()), max(times.values())
        chosen: dict[int, tuple[float, int, int]] = {}
        # The largest batch stays, of equal ones that of the lowest rate, which answers best.
        for rate, images in sorted(times, key=lambda batch: (batch[1], -batch[0])):
            seconds = times[rate, images]
            place = BUCKETS * (seconds - least) / ((most - least) or 1.0)
            chosen[min(int(place), BUCKETS - 1)] = seconds, rate, images
        return [batch for _, batch in sorted(chosen.items())]
