"""Which images run next, and at which rate: the queues behind the engine.

One queue for each kind of work and shape of images. The one whose head is most urgent, by when it
is due, then by age, fills the next batch; where the rate is left to the server, its controller
chooses one for the batch. Where images differ in priority, those whose turn it is decide, and
others ride along. Knows nothing of threads, and time is an argument: the engine runs it under its
lock, tests by a simulated clock.
"""

import math
from bisect import insort
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

from server.engine.rates import Controller, Decision, Elsewhere
from server.engine.times import DELAY, Flow, largest_batch, sacrificed
from server.engine.turns import NORMAL, Turns
from server.engine.work import Runnable, Waiting, Work

#: How long, in windows of its controller, images of a model are all refused before its times are
#: doubted, as only what runs tells how long it takes; and how many times too long they may be then.
STALE, DOUBT = 4.0, 4.0

#: What images of one batch have in common.
Alike: TypeAlias = tuple[Work, tuple[int, ...]]


@dataclass(frozen=True)
class Batch:
    """Images to run together.

    Attributes:
        work: at which rate, of which model.
        reason: `asked` for an exact rate, else the controller's.
        jobs: the images, the most urgent first.
    """

    work: Runnable
    reason: str
    jobs: Sequence[Any]


class _Gathering(NamedTuple):
    """A batch that waits for more images of its kind."""

    alike: Alike
    size: int  # images that are there
    since: float  # when the last of them came
    until: float  # when it waits no longer


class Scheduler:
    """See the module."""

    def __init__(self, max_batch: int, slo: float = math.inf, share: float = 0.0) -> None:
        """Begin with nothing to do.

        Args:
            max_batch: images in a batch.
            slo: seconds in which answers are wanted; batches of what has more time than that are
                no longer for it, since others may come meanwhile.
            share: of the time that each lower priority keeps while higher ones wait.
        """
        self.max_batch = max_batch
        self.slo = slo
        self._queues: dict[Alike, list[Any]] = {}
        # Asked for and not yet prepared: by their work, then their number.
        self._coming: dict[Work, dict[int, Waiting]] = {}
        self._exact = Flow()  # seconds of work that arrive for exact rates
        self._controllers: set[Controller] = set()  # of those that choose rates
        self._in_vain: dict[Controller, float] = {}  # since when all images of a model are refused
        self._turns = Turns(share)
        self._waiting: Counter[int] = Counter()  # images, by their priority
        self._gathering: _Gathering | None = None  # while the next batch waits for more
        self._ends = -math.inf  # when the batch that runs is to end, or the last one was

    def __len__(self) -> int:
        """Return how many images wait."""
        return self._waiting.total()

    def patience(self, now: float) -> float:
        """Return for how many seconds the next batch may wait for more images.

        No longer than the most urgent image can wait, and not at all for a batch of full size.
        """
        if any(len(queue) >= self.max_batch for queue in self._queues.values()):
            return 0.0
        latest = (
            queue[0].due - work.controller.times.batch(work.high, len(queue))
            for (work, _), queue in self._queues.items()
        )
        return min(latest, default=math.inf) - now

    def gather(self, now: float, preparing: float) -> float:
        """Return for how many seconds the next batch is to wait for images that are being prepared.

        It does while one is expected soon, has room in it and its most urgent image can spare it:
        for each no longer than running it along saves, for all no longer than a batch of one takes.
        To be asked again whenever something has changed.

        Args:
            now: the time.
            preparing: seconds that an image takes to be prepared, as a rule.
        """
        found, last = self._gathers(now), self._gathering
        if found is None:
            return 0.0
        alike, size, began, spare = found
        times, rate = alike[0].controller.times, alike[0].high
        if last is None or last[:2] != (alike, size):
            until = now + times.batch(rate, 1) if last is None else last.until
            last = self._gathering = _Gathering(alike, size, now, until)
        end = last.since + times.saved(rate, size)
        if began + preparing > end:
            return 0.0
        return max(0.0, min(end, last.until, now + spare) - now)

    def _gathers(self, now: float) -> tuple[Alike, int, float, float] | None:
        """Return kind and size of the next batch, since when one more comes, its head's slack."""
        if not self._queues:
            return None
        turn, alike, head = self._next()
        work, size = alike[0], len(self._queues[alike])
        times, limit = work.controller.times, self.max_batch
        budget, slack = min(self.slo, head.due - head.arrived), head.due - now
        if largest_batch(times, work.high, size + 1, limit, budget, slack) <= size:
            return None
        coming = self._coming.get(work, {}).values()
        began = min((job.began for job in coming if job.priority <= turn), default=math.inf)
        end = head.due if slack > 0 else head.deadline
        return alike, size, began, end - now - DELAY * times.batch(work.high, size + 1)

    def queued(self) -> Counter[Work]:
        """Return how many images wait for each kind of work."""
        found: Counter[Work] = Counter()
        for (work, _), queue in self._queues.items():
            found[work] += len(queue)
        return found

    def asked(self, work: Work, images: int, now: float) -> None:
        """Take note that images were asked for, whether they will be let in or not.

        Were those that are refused not counted, the others would seem to be few enough for the
        rate at which there is no room for all.
        """
        self._in_vain.setdefault(work.controller, now)
        if work.rate is None:
            self._controllers.add(work.controller)
            work.controller.arrived(images, now)

    def doubt(self, work: Work, now: float) -> float:
        """Return how many times too long images that were asked for may seem to take.

        If all were refused for seeming too slow, none would ever tell that they no longer are.
        """
        controller = work.controller
        stale = now - self._in_vain.get(controller, now) > STALE * controller.window
        return DOUBT if stale else 1.0

    def arrived(self, job: Waiting, now: float) -> None:
        """Take note that an image was let in; it is added when it is prepared."""
        work = job.work
        self._in_vain.pop(work.controller, None)
        self._coming.setdefault(work, {})[job.number] = job
        if work.rate is not None:
            seconds = work.controller.seconds(work.rate, self.max_batch)
            self._exact.add(seconds, now, work.controller.window)

    def add(self, job: Waiting) -> None:
        """Let a prepared image wait."""
        self._came(job)
        insort(self._queues.setdefault((job.work, job.shape), []), job, key=urgency)
        self._waiting[job.priority] += 1

    def discard(self, job: Waiting) -> None:
        """Let an image wait no longer, if it does, and expect it no longer."""
        self._came(job)
        # Not by its shape, which it has only once it is prepared.
        for alike, queue in self._queues.items():
            if alike[0] == job.work and job in queue:
                queue.remove(job)
                self._waiting[job.priority] -= 1
                if not queue:
                    del self._queues[alike]
                return

    def _came(self, job: Waiting) -> None:
        coming = self._coming.get(job.work, {})
        if coming.pop(job.number, None) is not None and not coming:
            del self._coming[job.work]

    def give_up(self, now: float) -> list[Any]:
        """Take out the images that no batch can answer by their deadlines.

        In a batch they would be late, and so would those that wait for it. The last one of a queue
        stays: only what runs tells how long it takes.
        """
        hopeless = []
        for (work, _), queue in self._queues.items():
            ends = now + DELAY * work.controller.times.batch(work.high, 1)
            hopeless += [job for job in queue[:-1] if job.deadline < ends]
        for job in hopeless:
            self.discard(job)
        return hopeless

    def take(self, now: float) -> Batch | None:
        """Take the next batch out of its queue; None if nothing waits."""
        self._gathering = None  # also if what waited was given up
        if not self._queues:
            return None
        priorities = self._priorities()
        turn, alike, _ = self._next()
        work, queue = alike[0], self._queues[alike]
        if len(priorities) > 1:
            queue = sorted(queue, key=lambda job: (job.priority != turn, job.priority))
        rate, reason, size = self._decide(alike, queue, turn, now)
        first = 0
        if size is None:
            first, size = self._cut(work, rate, queue, turn, now)
        seconds = work.controller.times.batch(rate, size)
        self._ends = now + seconds
        self._turns.ran(turn, seconds, priorities)
        batch, rest = queue[first : first + size], queue[:first] + queue[first + size :]
        self._waiting.subtract(job.priority for job in batch)
        if rest:
            self._queues[alike] = sorted(rest, key=urgency)
        else:
            del self._queues[alike]
        return Batch(work.at(rate), reason, batch)

    def _priorities(self) -> list[int]:
        """Return the priorities that wait."""
        return [priority for priority, images in self._waiting.items() if images]

    def _next(self) -> tuple[int, Alike, Any]:
        """Return whose turn it is, and its most urgent image with what that is like."""
        turn = self._turns.next(self._priorities())
        heads = {
            alike: head
            for alike, queue in self._queues.items()
            if (head := next((job for job in queue if job.priority == turn), None))
        }
        return turn, *min(heads.items(), key=lambda item: urgency(item[1]))

    def _decide(self, alike: Alike, queue: Sequence[Waiting], turn: int, now: float) -> Decision:
        """Return the rate of the next batch of a queue: what was asked for or is chosen."""
        work = alike[0]
        if work.rate is not None:
            return Decision(work.rate, "asked")
        waiting = [(job.arrived, job.due) for job in queue]
        coming = [
            (job.arrived, job.due)
            for job in self._coming.get(work, {}).values()
            if job.priority <= turn
        ]
        elsewhere = self._elsewhere(alike, now, turn)
        return work.controller.choose(work.low, work.high, waiting, elsewhere, now, coming)

    def _cut(
        self, work: Work, rate: int, queue: Sequence[Waiting], turn: int, now: float
    ) -> tuple[int, int]:
        """Return which images of a queue to run: the first and how many."""
        times, limit = work.controller.times, self.max_batch
        head = queue[0]
        budget = min(self.slo, head.due - head.arrived)
        dues = [job.due for job in queue if job.priority == turn]
        first = 0  # what is wanted later, too, need not stay behind
        if head.deadline <= head.due:
            first = sacrificed(times, rate, dues, limit, budget, now)
        # For what only rides along nobody stays behind.
        waiting = len(dues if first else queue) - first
        return first, largest_batch(times, rate, waiting, limit, budget, dues[first] - now)

    def ran(self, work: Runnable, images: int, seconds: float) -> None:
        """Take note that a batch is over, and what it took."""
        self._ends = -math.inf
        work.controller.times.measured(work.rate, images, seconds)

    def wait(
        self, work: Work, due: float, images: int, late: bool, now: float, priority: int = NORMAL
    ) -> float:
        """Return the seconds until some more images could be done, at their cheapest.

        Args:
            work: the images'.
            due: when they are due; what is due later does not keep them waiting.
            images: how many.
            late: whether they are wanted after that, too.
            now: the time.
            priority: theirs; what is of a lower one does not keep them waiting either.
        """
        same = {alike for alike in self._queues if alike[0] == work}
        ahead = sum(_ahead(self._queues[alike], due, priority) for alike in same)
        ahead += _ahead(self._coming.get(work, {}).values(), due, priority)
        seconds = max(0.0, self._ends - now) + self._backlog(work, same, due, priority)
        total = ahead + images
        if not late:
            # What comes later fills the last batch up: by half of what it has room for, say.
            room = -total % work.controller.size(work.high, total)
            seconds += room / 2 * work.controller.seconds(work.high, total)
        return seconds + self.alone(work, total, late)

    def alone(self, work: Work, images: int, late: bool) -> float:
        """Return the seconds that images take at their cheapest if nothing else waits.

        Args:
            work: the images'.
            images: how many.
            late: whether they are wanted after they are due, too.
        """
        each = work.controller.seconds(work.high, images)
        if late:  # then they may run in full batches
            each = min(each, work.controller.times.image(work.high, min(images, self.max_batch)))
        return images * each

    def _backlog(self, own: Work, without: Collection[Alike], due: float, priority: int) -> float:
        """Return the seconds of what goes before an image of `own` work, some queues left out."""
        images: Counter[Work] = Counter()
        for alike, queue in self._queues.items():
            if alike not in without:
                images[alike[0]] += _ahead(queue, due, priority)
        for work, coming in self._coming.items():
            if work != own:
                images[work] += _ahead(coming.values(), due, priority)
        total = 0.0
        for work, ahead in (+images).items():
            rate = min(max(work.low, work.controller.need), work.high)
            total += ahead * work.controller.seconds(rate, ahead)
        return total

    def _elsewhere(self, alike: Alike, now: float, priority: int) -> Elsewhere:
        work = alike[0]
        load = self._exact.rate(now, work.controller.window)
        for other in self._controllers - {work.controller}:
            load += other.load(other.need, now)
        due = self._queues[alike][-1].due
        return Elsewhere(self._backlog(work, [alike], due, priority), load)


def _ahead(images: Iterable[Waiting], due: float, priority: int) -> int:
    """Return how many images go before one: of higher priority, or of the same and due no later."""
    return sum((image.priority, image.due) <= (priority, due) for image in images)


def urgency(job: Waiting) -> tuple[float, int]:
    """Return what images are sorted by, the most urgent first: when they are due, then age."""
    return job.due, job.number
