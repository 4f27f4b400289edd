"""Choosing rates, case by case; what comes of it over time is in test_elastic.py."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.engine.rates import (
    HOLD,
    LOAD,
    MARGIN,
    Controller,
    Elsewhere,
    Flow,
    ServiceTimes,
    largest_batch,
)
from tests.server.works import controller

IDLE = Elsewhere()


def timed(seconds: float = 1.0, max_batch: int = 8) -> Controller:
    """A controller of a model that takes `seconds` an image at rate 0 and half of it at 16."""
    made = controller(max_batch)
    for rate in range(17):
        for size in (1, 2, 4, 8):
            made.times.measured(rate, size, size * seconds * (32 - rate) / 32)
    return made


def test_with_time_enough_it_is_the_lowest_rate():
    decision = timed().choose(0, 16, [10.0], IDLE, now=0.0)
    assert (decision.rate, decision.reason) == (0, "quality")
    assert timed().choose(3, 16, [10.0], IDLE, now=0.0).rate == 3


def test_a_deadline_asks_for_the_lowest_rate_that_keeps_it():
    made = timed()
    due = made.times.batch(6, 1) / MARGIN + 1e-9
    assert made.choose(0, 16, [due], IDLE, now=0.0).rate == 6
    assert timed().choose(0, 16, [due], IDLE, now=0.0).reason == "deadline"


def test_a_backlog_asks_for_a_rate_that_serves_all_in_time():
    made = timed()
    decision = made.choose(0, 16, [7.5 / MARGIN] * 10, IDLE, now=0.0)
    assert decision.reason == "backlog"
    assert 10 * made.times.image(decision.rate, 8) <= 7.5 < 10 * made.times.image(0, 8)
    assert 10 * made.times.image(decision.rate - 1, 8) > 7.5


def test_work_for_others_counts_as_backlog():
    made = timed()
    assert made.choose(0, 16, [2.5], Elsewhere(seconds=0.5), now=0.0).rate == 0
    assert timed().choose(0, 16, [2.5], Elsewhere(seconds=1.3), now=0.0).reason == "backlog"


def test_arrivals_ask_for_a_rate_that_keeps_up_with_them():
    made = timed(0.1)
    for i in range(1000):
        made.arrived(i / 12)
    decision = made.choose(0, 16, [math.inf], IDLE, now=1000 / 12)
    assert decision.reason == "load"
    assert made.load(decision.rate, 1000 / 12) <= LOAD < made.load(decision.rate - 1, 1000 / 12)
    assert made.arrivals.rate(1000 / 12, made.window()) == pytest.approx(12, rel=0.06)


def test_one_image_is_no_load_however_slow_the_model():
    made = timed(60)
    made.arrived(0.0)
    assert made.choose(0, 16, [math.inf], IDLE, now=0.0).rate == 0


def test_what_cannot_be_kept_runs_at_the_highest_rate_allowed():
    assert timed().choose(0, 11, [0.1], IDLE, now=0.0).rate == 11
    assert timed().choose(0, 11, [-5.0], IDLE, now=0.0).rate == 11


def test_up_at_once_and_down_after_a_while():
    made = timed()
    assert made.choose(0, 16, [10.0], IDLE, now=0.0).rate == 0
    up = made.choose(0, 16, [0.9], IDLE, now=0.1)
    assert up.rate > 0
    assert up.reason == "deadline"
    held = made.choose(0, 16, [10.0], IDLE, now=HOLD)
    assert (held.rate, held.reason) == (up.rate, "cooling")
    later = made.choose(0, 16, [20.0], IDLE, now=0.2 + HOLD)
    assert (later.rate, later.reason) == (0, "quality")


def test_what_was_needed_for_others_does_not_leave_the_range():
    made = timed()
    assert made.choose(0, 16, [0.1], IDLE, now=0.0).rate == 16
    assert made.choose(0, 4, [10.0], IDLE, now=0.1).rate == 4


@given(
    st.lists(st.floats(0, 30), min_size=1, max_size=20),
    st.tuples(st.integers(0, 16), st.integers(0, 16)).map(sorted),
    st.floats(0, 30),
    st.floats(0, 2),
)
def test_a_choice_is_in_the_range_and_no_rate_below_it_would_do(dues, bounds, seconds, load):
    low, high = bounds
    dues.sort()
    elsewhere = Elsewhere(seconds, load)
    chosen = timed().choose(low, high, dues, elsewhere, now=0.0).rate
    assert low <= chosen <= high
    for rate in range(low, chosen):
        assert timed().choose(rate, high, dues, elsewhere, now=0.0).rate >= chosen


def test_times_before_anything_was_measured():
    assert ServiceTimes(lambda rate: 1).batch(0, 8) == 0


def test_times_are_those_measured():
    times = ServiceTimes(lambda rate: 1)
    times.measured(0, 1, 2.0)
    times.measured(0, 4, 5.0)
    times.measured(8, 3, 3.0)  # three quarters of a batch of 4
    assert times.batch(0, 1) == 2
    assert times.batch(0, 4) == 5
    assert times.batch(8, 4) == 4
    assert times.image(0, 4) == 1.25


def test_times_that_were_not_measured_follow_the_multiply_adds():
    times = ServiceTimes(lambda rate: 32 - rate)
    times.measured(0, 1, 2.0)
    assert times.batch(16, 1) == 1
    assert times.batch(0, 8) == 16


def test_what_is_settled_no_longer_follows_another_rate():
    times = ServiceTimes(lambda rate: 100 - rate)
    times.measured(0, 4, 1.0)
    times.measured(0, 4, 2.0)  # the pace of all changes
    expected = times.batch(10, 4)
    times.settle([10], [4])
    assert times.batch(10, 4) == pytest.approx(expected)
    assert times.forget(0) == [4]
    times.measured(0, 4, 0.1)
    assert times.batch(10, 4) == pytest.approx(expected)


def test_a_machine_that_slows_down_does_so_at_every_rate():
    times = ServiceTimes(lambda rate: 1)
    for rate in (0, 8, 16):
        times.measured(rate, 1, 1.0)
    for _ in range(30):
        times.measured(16, 1, 3.0)
    assert times.batch(16, 1) == pytest.approx(3, rel=0.01)
    assert times.batch(0, 1) > 2
    for _ in range(100):
        times.measured(0, 1, 3.0)
    assert times.batch(0, 1) == pytest.approx(3, rel=0.01)


def test_one_slow_batch_is_not_believed():
    times = ServiceTimes(lambda rate: 1)
    times.measured(0, 1, 1.0)
    times.measured(0, 1, 100.0)
    assert times.batch(0, 1) < 4


def test_a_flow_forgets():
    flow = Flow()
    assert flow.rate(0.0, 1.0) == 0
    for i in range(2000):
        flow.add(1, i / 100, 1.0)
    assert flow.rate(20.0, 1.0) == pytest.approx(100, rel=0.02)
    assert flow.rate(30.0, 1.0) < 0.01


@pytest.mark.parametrize(
    ("waiting", "limit", "budget", "slack", "size"),
    [
        (1, 8, 0.1, 0.1, 1),  # something always runs
        (20, 8, math.inf, math.inf, 8),
        (3, 8, math.inf, math.inf, 3),
        (20, 8, 12.0, 12.0, 4),  # a third of the most urgent one's time
        (20, 8, math.inf, 2.5, 2),  # the most urgent one keeps its time
        (20, 8, math.inf, 0.5, 8),  # it is late already: others need not be
        (20, 8, math.inf, -1.0, 8),
    ],
)
def test_the_size_of_a_batch(waiting, limit, budget, slack, size):
    times = timed().times
    assert largest_batch(times, 0, waiting, limit, budget, slack) == size
