"""Choosing rates, case by case; what comes of it over time is in test_elastic.py."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.engine.rates import (
    AHEAD,
    AIM,
    CROWD,
    FULL,
    HOLD,
    MARGIN,
    Controller,
    Decision,
    Elsewhere,
)
from tests.server.works import controller

IDLE = Elsewhere()


def timed(seconds: float = 1.0, max_batch: int = 8, slo: float = math.inf) -> Controller:
    """A controller of a model that takes `seconds` an image at rate 0 and half of it at 16."""
    made = controller(max_batch, slo=slo)
    for rate in range(17):
        for size in (1, 2, 4, 8):
            made.times.measured(rate, size, size * seconds * (32 - rate) / 32)
    return made


def waiting(*dues: float) -> list[tuple[float, float]]:
    """Images that have just arrived."""
    return [(0.0, due) for due in dues]


def test_with_time_enough_it_is_the_lowest_rate():
    decision = timed().choose(0, 16, waiting(10.0), IDLE, now=0.0)
    assert (decision.rate, decision.reason) == (0, "quality")
    assert timed().choose(3, 16, waiting(10.0), IDLE, now=0.0).rate == 3


def test_a_deadline_asks_for_the_lowest_rate_that_keeps_it():
    made = timed()
    due = made.times.batch(6, 1) / MARGIN + 1e-9
    assert made.choose(0, 16, waiting(due), IDLE, now=0.0).rate == 6
    assert timed().choose(0, 16, waiting(due), IDLE, now=0.0).reason == "deadline"


def test_a_backlog_asks_for_a_rate_that_serves_all_in_time():
    made = timed()
    decision = made.choose(0, 16, [(0.0, 7.5 / CROWD)] * 10, IDLE, now=0.0)
    assert decision.reason == "backlog"
    assert 10 * made.times.image(decision.rate, 8) <= 7.5 < 10 * made.times.image(0, 8)
    assert 10 * made.times.image(decision.rate - 1, 8) > 7.5


def test_work_for_others_counts_as_backlog():
    made = timed()
    assert made.choose(0, 16, waiting(4.0), Elsewhere(seconds=0.5), now=0.0).rate == 0
    assert timed().choose(0, 16, waiting(4.0), Elsewhere(seconds=1.3), now=0.0).reason == "backlog"


def test_what_waits_soon_is_to_be_well_within_its_time():
    made = timed(0.01, slo=0.5)
    for i in range(1000):
        made.arrived(1, i / 150)
    now = 1000 / 150
    decision = made.choose(0, 16, [(now, now + 0.5)], IDLE, now)
    assert decision.reason == "load"

    def soon(rate: int) -> float:
        grows = max(0.0, made.load(rate, now) - FULL)
        return made.seconds(rate, 1) + AHEAD * 0.5 * grows

    assert soon(decision.rate) <= AIM * 0.5 < soon(decision.rate - 1)


def test_arrivals_that_can_be_kept_up_with_ask_for_nothing():
    made = timed(0.01, slo=0.5)
    for i in range(1000):
        made.arrived(1, i / 80)
    now = 1000 / 80
    assert made.load(0, now) == pytest.approx(0.8, rel=0.03)
    assert made.choose(0, 16, [(now, now + 0.5)], IDLE, now) == Decision(0, "quality")


def test_the_arrivals_of_others_count_as_load():
    made = timed(0.01, slo=0.5)
    others = FULL + AIM / AHEAD
    assert made.choose(0, 16, waiting(0.5), Elsewhere(load=others - 0.03), now=0.0).rate == 0
    assert made.choose(0, 16, waiting(0.5), Elsewhere(load=others), now=0.0).reason == "load"


def test_a_burst_is_met_by_its_first_batch():
    made = timed(0.03, slo=0.5)
    for i in range(20):
        made.arrived(1, i / 10)
    assert made.choose(0, 16, [(2.0, 2.5)], IDLE, now=2.0).rate == 0
    for _ in range(24):
        made.arrived(1, 2.0)  # only one of them is prepared when the batch begins
    first = made.choose(0, 16, [(2.0, 2.5)], IDLE, now=2.0)
    assert first.reason == "load"
    assert first.rate > 4


def test_images_that_are_not_prepared_count_as_backlog():
    made = timed(0.05, slo=0.75)
    decision = made.choose(0, 16, waiting(0.75), IDLE, 0.0, coming=waiting(*[0.75] * 9))
    assert (decision.rate, decision.reason) == (13, "backlog")


def test_a_quiet_moment_does_not_hide_that_much_arrives():
    made = timed(0.01)
    for i in range(1000):
        made.arrived(1, i / 100)
    later = 10.0 + made.window / 4
    assert made.load(0, later) == pytest.approx(math.exp(-1 / 4), rel=0.1)


def test_one_image_is_no_load_however_slow_the_model():
    made = timed(60, slo=100)
    made.arrived(1, 0.0)
    assert made.choose(0, 16, waiting(160), IDLE, now=0.0).rate == 0


def test_what_cannot_be_kept_runs_at_the_highest_rate_allowed():
    assert timed().choose(0, 11, waiting(0.1), IDLE, now=0.0).rate == 11
    assert timed().choose(0, 11, waiting(-5.0), IDLE, now=0.0).rate == 11


def test_up_at_once_and_down_after_a_while():
    made = timed(slo=5.0)
    assert made.choose(0, 16, waiting(10.0), IDLE, now=0.0).rate == 0
    up = made.choose(0, 16, waiting(*[5.0] * 8), IDLE, now=0.1)
    assert up.rate > 0
    assert up.reason == "backlog"
    held = made.choose(0, 16, waiting(10.0), IDLE, now=0.05 + HOLD)
    assert (held.rate, held.reason) == (up.rate, "cooling")
    later = made.choose(0, 16, waiting(20.0), IDLE, now=0.2 + HOLD)
    assert (later.rate, later.reason) == (0, "quality")


def test_what_was_needed_for_others_does_not_leave_the_range():
    made = timed(slo=5.0)
    assert made.choose(0, 16, waiting(*[5.0] * 20), IDLE, now=0.0).rate == 16
    assert made.choose(0, 4, waiting(10.0), IDLE, now=0.1).rate == 4


def test_the_bounds_of_one_request_do_not_reach_others():
    made = timed(slo=5.0)
    assert made.choose(16, 16, waiting(10.0), IDLE, now=0.0).rate == 16
    assert made.choose(0, 16, waiting(10.0), IDLE, now=0.5) == Decision(0, "quality")
    assert made.need == 0


def test_a_deadline_shorter_than_the_servers_own_does_not_reach_others():
    made = timed(slo=5.0)
    assert made.choose(0, 16, waiting(0.1), IDLE, now=0.0) == Decision(16, "deadline")
    assert made.choose(0, 16, waiting(10.0), IDLE, now=0.5) == Decision(0, "quality")


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
    chosen = timed().choose(low, high, waiting(*dues), elsewhere, now=0.0).rate
    assert low <= chosen <= high
    for rate in range(low, chosen):
        assert timed().choose(rate, high, waiting(*dues), elsewhere, now=0.0).rate >= chosen
