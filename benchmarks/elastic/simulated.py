"""What ways to choose rates are worth, on a simulated machine: no clock, the same figures anywhere.

    python -m benchmarks.elastic.simulated --repeats 3

Arrivals, the scheduler and the policies are those of the server and of `serve_elastic`; the machine
is a table of how long batches take. It decodes in threads of their own, refuses what would be late
and drops what is, as an engine does. Beside fixed rates, the server's `auto` and SlackFit there is
the oracle's bound.
"""

import argparse
import heapq
import itertools
import math
import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.elastic.oracle import best
from benchmarks.estimates import markdown, spread
from benchmarks.load import Step, gamma_plan, poisson_plan
from server.engine.rates import Controller
from server.engine.scheduler import Batch, Scheduler
from server.engine.slackfit import SlackFit
from server.engine.times import ServiceTimes
from server.engine.turns import NORMAL
from server.engine.work import Work

#: What the bundled model takes at its rates: seconds of a batch, and of each image in it. As
#: measured without graphs on two cores, while they also decoded and spoke HTTP.
BATCH, IMAGE = (0.007, 0.0085, 0.010, 0.0115, 0.013), (0.019, 0.0166, 0.0152, 0.0132, 0.0118)
#: Its top-1 on the photographs of docs/results.md.
TOP_1 = (0.820, 0.817, 0.817, 0.811, 0.799)
#: Seconds by which a wait is over for certain, however its end is rounded.
INSTANT = 1e-6


@dataclass(frozen=True)
class Asked:
    """Work that takes simulated time; `rate` None: left to the controller."""

    controller: Controller = field(compare=False)
    rate: Any
    low: int
    high: int

    def at(self, rate: int) -> "Asked":
        """Return the same at an exact rate."""
        return Asked(self.controller, rate, rate, rate)

    def __call__(self, images: Any) -> Sequence[Any]:
        """Not to be called: nothing really runs."""
        raise NotImplementedError


@dataclass
class Image:
    """An image that is asked for, and what became of it; `rate` -1: it was not answered.

    Attributes:
        arrived, began, due, done: seconds.
    """

    work: Work
    arrived: float
    due: float
    number: int
    began: float = math.inf
    rate: int = -1
    reason: str = ""
    done: float = 0.0
    priority: int = NORMAL
    shape: tuple[int, ...] = (3, 224, 224)

    @property
    def deadline(self) -> float:
        """When its answer is of no more use."""
        return self.due

    @property
    def in_time(self) -> bool:
        """Whether it was answered when it was due."""
        return self.rate >= 0 and self.done <= self.due


@dataclass(frozen=True)
class Machine:
    """What runs.

    Attributes:
        seconds: that a batch of so many images takes at a rate, which begins at a time.
        decode: seconds that an image takes to be prepared.
        decoders: images that are prepared at once.
    """

    seconds: Callable[[int, int, float], float]
    decode: float = 0.004
    decoders: int = 2


class Simulation:
    """A machine that serves one kind of work, from its first arrival to its last answer."""

    def __init__(self, machine: Machine, scheduler: Scheduler, work: Work, slo: float) -> None:
        self._machine, self._scheduler, self._work, self._slo = machine, scheduler, work, slo
        self._undecoded: deque[Image] = deque()
        self._decoding = 0
        self._busy = False
        self._numbers = itertools.count()
        self._events: list[tuple[float, int, Callable[[float], None]]] = []

    def run(self, arrivals: Sequence[float]) -> list[Image]:
        """Serve what arrives at these times; return all images, in their order."""
        images = [Image(self._work, at, at + self._slo, i) for i, at in enumerate(arrivals)]
        for image in images:
            self._at(image.arrived, self._arrive, image)
        while self._events:
            now, _, happen = heapq.heappop(self._events)
            happen(now)
        return images

    def _at(self, when: float, what: Callable[..., None], *of: Any) -> None:
        event = when, next(self._numbers), lambda now: what(*of, now)
        heapq.heappush(self._events, event)

    def _arrive(self, image: Image, now: float) -> None:
        self._scheduler.asked(self._work, 1, now)
        if now + self._scheduler.wait(self._work, image.due, 1, False, now) > image.due:
            return  # refused
        self._scheduler.arrived(image, now)
        self._undecoded.append(image)
        self._decode(now)

    def _decode(self, now: float) -> None:
        while self._undecoded and self._decoding < self._machine.decoders:
            self._decoding += 1
            image = self._undecoded.popleft()
            image.began = now
            self._at(now + self._machine.decode, self._decoded, image)

    def _decoded(self, image: Image, now: float) -> None:
        self._decoding -= 1
        self._decode(now)
        self._scheduler.add(image)
        self._take(now)

    def _take(self, now: float) -> None:
        if self._busy:
            return
        patience = self._scheduler.gather(now, self._machine.decode)
        if patience > 0:
            self._at(now + patience + INSTANT, self._take)
            return
        self._scheduler.give_up(now)
        while (batch := self._scheduler.take(now)) is not None:
            ready = [image for image in batch.jobs if now < image.due]
            if ready:
                self._busy = True
                spent = self._machine.seconds(batch.work.rate, len(ready), now)
                self._at(now + spent, self._ran, batch, ready, spent)
                return

    def _ran(self, batch: Batch, ready: Sequence[Image], spent: float, now: float) -> None:
        self._busy = False
        self._scheduler.ran(batch.work, len(ready), spent)
        for image in ready:
            image.rate, image.reason, image.done = batch.work.rate, batch.reason, now
        self._take(now)


def usual(rate: int, images: int) -> float:
    """Return the seconds that a batch of the bundled model takes as a rule."""
    return BATCH[rate] + images * IMAGE[rate]


def uneven(seed: int, deviation: float = 0.08) -> Machine:
    """Return a machine whose batches take more or less than usual, by chance."""
    chance = random.Random(seed)
    return Machine(
        lambda rate, images, _: usual(rate, images) * chance.lognormvariate(0, deviation)
    )


def serve(
    kind: type[Controller],
    rate: int | None,
    arrivals: Sequence[float],
    slo: float,
    machine: Machine,
    max_batch: int = 16,
) -> list[Image]:
    """Serve arrivals at a fixed rate, or (None) at those that a kind of controller chooses."""
    times = ServiceTimes(lambda rate: round(1e6 * IMAGE[rate]))
    for each, size in itertools.product(range(len(IMAGE)), (1, 2, 4, 8, 16)):
        times.measured(each, size, usual(each, size))
    work = Asked(kind(times, max_batch, slo), None, 0, len(IMAGE) - 1)
    if rate is not None:
        work = work.at(rate)
    return Simulation(machine, Scheduler(max_batch, slo), work, slo).run(arrivals)


def effective(images: Sequence[Image]) -> float:
    """Return the effective accuracy, in percent."""
    return 100 * sum(TOP_1[image.rate] for image in images if image.in_time) / len(images)


def capacity(rate: int, max_batch: int = 16) -> float:
    """Return the images a second in full batches."""
    return max_batch / usual(rate, max_batch)


def plans(name: str, repeats: int, seconds: float = 15) -> list[list[float]]:
    """Return the arrivals of a trace, once for each seed: `steps`, or the variation of its gaps."""
    third = seconds / 3
    if name == "steps":
        quiet, burst = 0.5 * capacity(0), 0.9 * capacity(len(IMAGE) - 1)
        steps = Step(third, quiet), Step(third, burst), Step(third, quiet)
        return [poisson_plan(steps, seed) for seed in range(repeats)]
    return [gamma_plan(seconds, 0.6 * capacity(0), float(name), seed) for seed in range(repeats)]


def main(argv: Sequence[str] | None = None) -> None:
    """Simulate and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5, help="seeds of each trace")
    parser.add_argument("--seconds", type=float, default=15, help="of each trace")
    parser.add_argument("--slo-ms", type=int, default=500)
    parser.add_argument("--variations", nargs="*", default=["4", "6"], help="of gaps, in bursts")
    options = parser.parse_args(argv)
    slo = options.slo_ms / 1000
    traces = {
        name: plans(name, options.repeats, options.seconds)
        for name in ("steps", *options.variations)
    }
    arms: dict[str, tuple[type[Controller], int | None]] = {
        "auto": (Controller, None),
        "SlackFit": (SlackFit, None),
        **{f"rate {rate}": (Controller, rate) for rate in range(len(IMAGE))},
    }
    rows = []
    for name, (kind, rate) in arms.items():
        row = [name]
        for arrivals in traces.values():
            served = [
                serve(kind, rate, plan, slo, uneven(seed)) for seed, plan in enumerate(arrivals)
            ]
            answered = sum(image.in_time for images in served for image in images)
            share = 100 * answered / sum(map(len, served))
            row += [spread([effective(images) for images in served], ".1f"), f"{share:.1f}"]
        rows.append(row)
    bound = ["oracle, a bound"]
    for arrivals in traces.values():
        found = [100 * best(plan, slo, TOP_1, usual, 16) for plan in arrivals]
        bound += [spread(found, ".1f"), ""]
    header = ["requests at"]
    for name in traces:
        of = name if name == "steps" else f"gaps that vary by {name}"
        header += [f"{of}: effective accuracy, %", "in time, %"]
    print(markdown(header, [*rows, bound]))


if __name__ == "__main__":
    main()
