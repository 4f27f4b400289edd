"""SlackFit, case by case: the bucket below the slack decides rate and size."""

import math

import pytest

from server.engine.rates import Decision, Elsewhere
from server.engine.scheduler import Scheduler
from server.engine.slackfit import SlackFit
from server.engine.times import ServiceTimes
from tests.server.works import Open

IDLE = Elsewhere()


def timed(max_batch: int = 8) -> SlackFit:
    """One second an image at rate 0 and half of it at 16."""
    times = ServiceTimes(lambda rate: 32 - rate)
    for rate in range(17):
        for size in (1, 2, 4, 8):
            times.measured(rate, size, size * (32 - rate) / 32)
    return SlackFit(times, max_batch)


def choose(slack: float, waiting: int = 20, low: int = 0, high: int = 16) -> Decision:
    images = [(0.0, slack)] * waiting
    return timed().choose(low, high, images, IDLE, now=0.0)


def test_much_slack_is_the_best_rate_and_the_largest_batch():
    assert choose(100) == Decision(0, "slack", 8)
    assert choose(8) == Decision(0, "slack", 8)
    assert choose(100, low=3) == Decision(3, "slack", 8)


@pytest.mark.parametrize("slack", [1.25, 2.5, 4.0, 5.5, 7.0])
def test_a_batch_ends_within_the_slack(slack):
    decision = choose(slack)
    assert timed().times.batch(decision.rate, decision.images) <= slack


def test_less_slack_is_a_higher_rate_then_a_smaller_batch():
    chosen = [choose(slack) for slack in (8, 6.9, 6, 5, 4.1, 3, 2, 1)]
    assert [each.images for each in chosen[:5]] == [8] * 5
    assert [each.rate for each in chosen[:5]] == sorted({each.rate for each in chosen[:5]})
    assert [each.images for each in chosen[4:]] == sorted(
        {each.images for each in chosen[4:]}, reverse=True
    )


def test_without_slack_it_is_the_quickest_bucket():
    assert choose(-1) == choose(0.5)
    assert timed().times.batch(choose(-1).rate, choose(-1).images) <= 0.5 + 7.5 / 10


def test_no_batch_is_larger_than_what_waits():
    assert choose(100, waiting=3) == Decision(0, "slack", 3)


def test_one_rate_and_no_times_are_enough():
    assert choose(100, low=5, high=5) == Decision(5, "slack", 8)
    untimed = SlackFit(ServiceTimes(lambda rate: 32 - rate), 8)
    assert untimed.choose(0, 16, [(0.0, 9.0)], IDLE, now=0.0).rate == 0


class Waits:
    def __init__(self, work: Open, number: int) -> None:
        self.work, self.number = work, number
        self.arrived, self.due, self.priority, self.shape = 0.0, 100.0, 1, (3, 8, 8)


def test_a_scheduler_runs_as_many_as_it_says():
    work = Open(controller=timed(4))
    scheduler = Scheduler(max_batch=8, slo=math.inf)
    for number in range(8):
        scheduler.add(Waits(work, number))
    batch = scheduler.take(0.0)
    assert (batch.work.rate, batch.reason, len(batch.jobs)) == (0, "slack", 4)
