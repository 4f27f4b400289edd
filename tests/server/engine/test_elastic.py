"""What choosing rates comes to over time: a simulated machine and clock, seeded arrivals.

The machine takes 20 ms an image at rate 0 and half of it at 16, and some for each batch, as a
small ViT on two cores. Everything is to be answered within 300 ms.
"""

import itertools
import random
from collections.abc import Callable, Iterator

import pytest

from benchmarks.elastic import simulated
from benchmarks.elastic.simulated import Image, Machine, Simulation
from benchmarks.load import Step, poisson_plan
from server.engine.rates import HOLD, Controller
from server.engine.scheduler import Scheduler
from tests.server.works import Exact, Open, controller

SLO = 0.3
BATCH = 8


def seconds(rate: int, images: int, pace: float = 1.0) -> float:
    """What a batch really takes."""
    return pace * (0.004 + 0.02 * images * (32 - rate) / 32)


def capacity(rate: int) -> float:
    """Images a second in full batches."""
    return BATCH / seconds(rate, BATCH)


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
    machine = Machine(lambda rate, size, now: seconds(rate, size, pace(now)), decode=0.0)
    return Simulation(machine, Scheduler(BATCH, SLO), work, SLO).run(list(arrivals))


def open_work() -> Open:
    return Open(controller=controller(BATCH, slo=SLO))


def in_time(images: list[Image]) -> float:
    return sum(image.in_time for image in images) / len(images)


def between(images: list[Image], start: float, end: float) -> list[Image]:
    return [image for image in images if start <= image.arrived < end]


def mean_rate(images: list[Image]) -> float:
    answered = [image.rate for image in images if image.rate >= 0]
    return sum(answered) / len(answered)


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
    assert in_time(stock) < 0.6


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


@pytest.mark.parametrize("rate", [None, 0, 4])
@pytest.mark.parametrize("load", [1.2, 2.0])
def test_with_too_much_to_do_as_much_is_answered_in_time_as_can_be(rate, load):
    possible = simulated.capacity(4 if rate is None else rate)
    arrivals = poisson_plan([Step(8.0, load * possible)], seed=1)
    images = simulated.serve(Controller, rate, arrivals, 0.5, simulated.uneven(1))
    assert sum(image.in_time for image in images) > 0.9 * 8.0 * possible


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


def beside(*exact: Image) -> tuple[int, str]:
    """What is chosen for an image where others of an exact rate were asked for."""
    shared = exact[0].work.controller
    for rate, size in itertools.product(range(17), (1, 2, 4, 8)):
        shared.times.measured(rate, size, seconds(rate, size))
    scheduler = Scheduler(BATCH, SLO)
    for image in exact:
        scheduler.arrived(image, image.arrived)
    last = exact[-1]
    for image in exact[::2]:
        scheduler.add(image)
    now = last.arrived
    # Due before all others, so that it is its turn, but for one that is as urgent as they are.
    scheduler.add(Image(Open(controller=shared), now, now + SLO - 0.01, 1000))
    scheduler.add(Image(Open(controller=shared), now, now + SLO, 1001))
    batch = scheduler.take(now)
    return batch.work.rate, batch.reason


def test_exact_rates_count_whether_they_are_prepared_or_not():
    exact = Exact(rate=0, controller=controller(BATCH, slo=SLO))
    assert beside(*(Image(exact, 0.0, SLO, i) for i in range(3)))[0] == 0
    rate, reason = beside(*(Image(exact, 0.0, SLO, i) for i in range(10)))
    assert (rate > 0, reason) == (True, "backlog")


def test_what_was_asked_for_and_given_up_is_no_longer_expected():
    work, scheduler = open_work(), Scheduler(BATCH, SLO)
    images = [Image(work, 0.0, SLO, i) for i in range(40)]
    for image in images:
        scheduler.arrived(image, 0.0)
        work.controller.times.measured(0, 1, seconds(0, 1))
    assert scheduler.wait(work, SLO, 1, False, 0.0) > SLO
    for image in images:
        scheduler.discard(image)
    assert scheduler.wait(work, SLO, 1, False, 0.0) < SLO


def test_the_rest_of_the_batch_that_runs_is_waited_for():
    work, scheduler = Exact(controller=controller(BATCH, slo=SLO)), Scheduler(BATCH, SLO)
    work.controller.times.measured(0, 1, 0.1)
    scheduler.add(Image(work, 0.0, SLO, 0))
    batch = scheduler.take(0.0)
    assert scheduler.wait(work, SLO, 1, False, 0.04) == pytest.approx(0.06 + 0.1)
    scheduler.ran(batch.work, 1, 0.05)
    assert scheduler.wait(work, SLO, 1, False, 0.05) == work.controller.times.batch(0, 1)


def test_those_who_come_later_fill_the_last_batch_up():
    work, scheduler = Exact(controller=controller(4)), Scheduler(4)
    for size in (1, 2, 4):
        work.controller.times.measured(0, size, size)
    waits = []
    for number in range(6):
        waits.append(scheduler.wait(work, 100, 1, False, 0.0))
        scheduler.add(Image(work, 0.0, 50.0, number))
    assert waits == [1, 2, 3, 4, 5 + 1.5, 6 + 1]
