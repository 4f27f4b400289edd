"""What choosing rates comes to over time: a simulated machine and clock, seeded arrivals.

The machine takes 20 ms an image at rate 0 and half of it at 16, and some for each batch, as a
small ViT on two cores. Everything is to be answered within 300 ms.
"""

import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest

from server.engine.rates import HOLD
from server.engine.scheduler import Scheduler
from server.engine.turns import NORMAL
from tests.server.works import Exact, Open, controller

SLO = 0.3
BATCH = 8


def seconds(rate: int, images: int, pace: float = 1.0) -> float:
    """What a batch really takes."""
    return pace * (0.004 + 0.02 * images * (32 - rate) / 32)


def capacity(rate: int) -> float:
    """Images a second in full batches."""
    return BATCH / seconds(rate, BATCH)


@dataclass
class Image:
    work: Exact | Open
    arrived: float
    due: float
    number: int
    priority: int = NORMAL
    rate: int = -1
    reason: str = ""
    done: float = 0.0
    shape: tuple[int, ...] = (3, 8, 8)


def poisson(rate: Callable[[float], float], until: float, seed: int) -> Iterator[float]:
    """Arrivals at a rate that changes with time, by thinning."""
    chance = random.Random(seed)
    highest = max(rate(i * until / 1000) for i in range(1000))
    now = 0.0
    while (now := now + chance.expovariate(highest)) < until:
        if chance.random() < rate(now) / highest:
            yield now


def simulate(
    work: Exact | Open,
    arrivals: Iterator[float],
    pace: Callable[[float], float] = lambda now: 1.0,
) -> list[Image]:
    """Run one machine that is never idle while anything waits; return all images."""
    times = work.controller.times
    for rate, size in itertools.product(range(17), (1, 2, 4, 8)):
        times.measured(rate, size, seconds(rate, size))
    images = [Image(work, at, at + SLO, i) for i, at in enumerate(arrivals)]
    scheduler, now, coming = Scheduler(BATCH), 0.0, 0
    while coming < len(images) or scheduler:
        if not scheduler:
            now = max(now, images[coming].arrived)
        while coming < len(images) and images[coming].arrived <= now:
            scheduler.arrived(work, images[coming].arrived)
            scheduler.add(images[coming])
            coming += 1
        batch = scheduler.take(now)
        assert batch is not None
        spent = seconds(batch.work.rate, len(batch.jobs), pace(now))
        times.measured(batch.work.rate, len(batch.jobs), spent)
        now += spent
        for image in batch.jobs:
            image.rate, image.reason, image.done = batch.work.rate, batch.reason, now
    return images


def open_work() -> Open:
    return Open(controller=controller(BATCH, slo=SLO))


def in_time(images: list[Image]) -> float:
    return sum(image.done <= image.due for image in images) / len(images)


def between(images: list[Image], start: float, end: float) -> list[Image]:
    return [image for image in images if start <= image.arrived < end]


def mean_rate(images: list[Image]) -> float:
    return sum(image.rate for image in images) / len(images)


@pytest.mark.parametrize("seed", range(3))
def test_a_steady_load_that_rate_0_can_do_runs_at_rate_0(seed):
    images = simulate(open_work(), poisson(lambda now: 0.5 * capacity(0), 30, seed))
    assert in_time(images) == 1
    assert mean_rate(images) < 1


@pytest.mark.parametrize("seed", range(3))
def test_a_steady_load_that_only_high_rates_can_do_is_done(seed):
    load = 0.9 * capacity(16)
    assert load > capacity(8)
    images = simulate(open_work(), poisson(lambda now: load, 30, seed))
    assert in_time(between(images, 2, 30)) > 0.97
    assert mean_rate(between(images, 2, 30)) > 12
    stock = simulate(
        Exact(rate=0, controller=controller(BATCH, slo=SLO)), poisson(lambda now: load, 30, 0)
    )
    assert in_time(stock) < 0.2


@pytest.mark.parametrize("seed", range(5))
def test_a_burst_is_answered_in_time_and_then_it_is_rate_0_again(seed):
    def load(now: float) -> float:
        return 0.9 * capacity(16) if 10 <= now < 20 else 0.5 * capacity(0)

    images = simulate(open_work(), poisson(load, 30, seed))
    assert in_time(images) > 0.97
    assert mean_rate(between(images, 0, 10)) < 1
    assert mean_rate(between(images, 12, 20)) > 11
    assert mean_rate(between(images, 20 + 5, 30)) < 1


def test_a_ramp_is_followed_up_and_down():
    def load(now: float) -> float:
        return capacity(0) * (0.3 + 1.2 * min(now, 60 - now) / 30)

    images = simulate(open_work(), poisson(load, 60, 0))
    assert in_time(images) > 0.98
    means = [mean_rate(between(images, start, start + 10)) for start in range(0, 60, 10)]
    assert means[0] < 0.5
    assert means[0] < means[1] < means[2]
    assert means[3] > means[4] > means[5]


def test_on_and_off_load_does_not_make_rates_flap():
    def load(now: float) -> float:
        return 1.2 * capacity(0) if now % 1 < 0.5 else 0.2 * capacity(0)

    images = simulate(open_work(), poisson(load, 60, 0))
    assert in_time(images) > 0.98
    chosen = [rate for rate, _ in itertools.groupby(image.rate for image in images)]
    falls = [i for i in range(1, len(chosen)) if chosen[i] < chosen[i - 1]]
    assert len(falls) < 60 / HOLD * 2


def test_a_machine_that_slows_down_is_noticed():
    def pace(now: float) -> float:
        return 1.6 if 10 <= now < 20 else 1.0

    images = simulate(open_work(), poisson(lambda now: 0.8 * capacity(0), 30, 0), pace)
    assert in_time(images) > 0.97
    assert mean_rate(between(images, 12, 20)) > mean_rate(between(images, 0, 10)) + 4
    assert mean_rate(between(images, 25, 30)) < 5


def test_more_than_any_rate_can_do_runs_at_the_highest():
    images = simulate(open_work(), poisson(lambda now: 1.5 * capacity(16), 10, 0))
    assert mean_rate(between(images, 1, 10)) > 15.9


def test_exact_rates_are_kept_beside_open_ones():
    shared = controller(BATCH, slo=SLO)
    exact, left = Exact(rate=3, controller=shared), Open(controller=shared)
    scheduler = Scheduler(BATCH)
    for i in range(40):
        scheduler.add(Image((exact, left)[i % 2], 0.0, SLO, i))
    rates = set()
    while batch := scheduler.take(0.0):
        assert len({image.work for image in batch.jobs}) == 1
        if batch.jobs[0].work == exact:
            assert (batch.work.rate, batch.reason) == (3, "asked")
        else:
            rates.add(batch.work.rate)
    assert rates == {0}  # nothing was measured, so nothing is known to be slow


def test_exact_rates_that_arrive_count_as_load():
    shared = controller(BATCH, slo=SLO)
    for rate, size in itertools.product(range(17), (1, 2, 4, 8)):
        shared.times.measured(rate, size, seconds(rate, size))
    exact, left = Exact(rate=0, controller=shared), Open(controller=shared)
    scheduler = Scheduler(BATCH)
    for i in range(200):
        scheduler.arrived(exact, i / (0.7 * capacity(0)))
    now = 200 / (0.7 * capacity(0))
    for _ in range(round(0.35 * capacity(0))):
        scheduler.arrived(left, now)
    scheduler.add(Image(left, now, now + 100, 0))
    batch = scheduler.take(now)
    assert batch.reason == "load"
    assert batch.work.rate > 0
