import math
import sys
import threading

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from server.engine.times import DELAY, SLICE, Flow, ServiceTimes, largest_batch, sacrificed
from tests.server.engine.test_rates import timed


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


def test_a_size_between_two_that_were_measured_is_on_the_line():
    times = ServiceTimes(lambda rate: 32 - rate)
    times.measured(0, 1, 3.0)
    times.measured(0, 16, 33.0)  # 1 for the batch and 2 for each image
    assert [times.batch(0, size) for size in (1, 2, 4, 8, 16)] == [3, 5, 9, 17, 33]
    assert times.batch(16, 4) == 4.5
    assert times.batch(0, 32) == 66
    times.measured(16, 16, 20.0)  # the nearest rate is now another
    assert times.batch(12, 16) == pytest.approx(25)


def test_multiply_adds_are_counted_once_for_each_rate():
    counted = []
    times = ServiceTimes(lambda rate: counted.append(rate) or 32 - rate)
    times.measured(0, 1, 2.0)
    for _ in range(3):
        times.batch(16, 1)
        times.batch(16, 8)
    assert sorted(counted) == [0, 16]


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


@given(
    st.lists(
        st.tuples(st.integers(0, 4), st.sampled_from([1, 2, 5, 8, 32]), st.floats(0.01, 1)),
        max_size=12,
    )
)
def test_who_asks_in_between_changes_nothing(batches):
    asked, quiet = ServiceTimes(lambda rate: 9 - rate), ServiceTimes(lambda rate: 9 - rate)
    for rate, images, seconds in batches:
        for times in (asked, quiet):
            if seconds > 0.9:
                times.forget(rate)
            times.measured(rate, images, seconds)
        for at in range(5):
            asked.batch(at, 8)
    for at in range(5):
        for images in (1, 3, 8, 64):
            assert asked.batch(at, images) == quiet.batch(at, images)


def test_a_batch_that_is_held_up_does_not_say_that_all_will_be():
    times = ServiceTimes(lambda rate: 1)
    times.measured(0, 1, 1.0)
    times.measured(0, 1, 50.0)
    assert times.batch(0, 1) < 1.3


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


def test_times_are_read_while_they_change():
    """A table that changed in place would break the search for the nearest cell in it."""
    times = ServiceTimes(lambda rate: 1)
    times.measured(0, 1, 1.0)
    ended = threading.Event()

    def change() -> None:
        while not ended.is_set():
            for rate in range(1, 64):
                times.measured(rate, 1, 1.0)
            for rate in range(1, 64):
                times.forget(rate)

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    writer = threading.Thread(target=change)
    writer.start()
    try:
        assert {times.batch(0, 8) > 0 for _ in range(3000)} == {True}
    finally:
        ended.set()
        writer.join()
        sys.setswitchinterval(before)


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
        (20, 8, 15.0, 15.0, 5),  # a third of the most urgent one's time
        (20, 8, math.inf, 2.5, 2),  # the most urgent one keeps its time
        (20, 8, math.inf, 0.5, 8),  # it is late already: others need not be
        (20, 8, math.inf, -1.0, 8),
    ],
)
def test_the_size_of_a_batch(waiting, limit, budget, slack, size):
    times = timed().times
    assert largest_batch(times, 0, waiting, limit, budget, slack) == size


@given(
    seconds=st.dictionaries(st.sampled_from([1, 2, 4, 8, 16, 64]), st.floats(0.01, 1), min_size=1),
    waiting=st.integers(0, 100),
    limit=st.sampled_from([1, 3, 16, 64]),
    budget=st.floats(0.01, 3) | st.just(math.inf),
    slack=st.floats(0.01, 2) | st.just(math.inf),
)
@example(  # where rounding matters
    seconds={64: 0.01}, waiting=64, limit=64, budget=3 * 0.01 * 29 / 64, slack=math.inf
)
def test_the_size_of_a_batch_is_the_largest_that_fits(seconds, waiting, limit, budget, slack):
    times = ServiceTimes(lambda rate: 1)
    for images, took in seconds.items():
        times.measured(0, images, took)
    allowed = SLICE * budget
    if slack > DELAY * times.batch(0, 1):
        allowed = min(allowed, slack / DELAY)
    size = min(waiting, limit)
    while size > 1 and times.batch(0, size) > allowed:
        size -= 1
    assert largest_batch(times, 0, waiting, limit, budget, slack) == size


def test_a_large_batch_is_cut_in_few_steps():
    times, asked = ServiceTimes(lambda rate: 1), []
    times.measured(0, 1, 1.0)
    batch = times.batch
    times.batch = lambda rate, images: asked.append(images) or batch(rate, images)
    assert largest_batch(times, 0, 1000, 1000, 15.5, math.inf) == 5
    assert len(asked) < 20


def behind() -> ServiceTimes:
    """Batches take 100 ms, and 20 ms for each image."""
    made = ServiceTimes(lambda rate: 1)
    for size in (1, 2, 4, 8):
        made.measured(0, size, 0.1 + 0.02 * size)
    return made


def test_who_would_make_all_others_late_is_left_behind():
    # One image a batch would be in time from the start, which takes 0.12 s for each of them.
    dues = [0.15 + 0.05 * i for i in range(12)]
    left = sacrificed(behind(), 0, dues, limit=8, budget=1.5, now=0.0)
    assert 0 < left < 8
    assert largest_batch(behind(), 0, 12 - left, 8, 1.5, dues[left]) > 1


@pytest.mark.parametrize(
    "dues",
    [
        [0.15],
        [0.15, 0.5, 1.0, 1.4],  # few enough for small batches
        [1.2 + 0.01 * i for i in range(12)],  # time enough for large ones
        [-0.1 + 0.01 * i for i in range(12)],  # late already, for whom all run at once
    ],
)
def test_nobody_is_left_behind_without_need(dues):
    assert sacrificed(behind(), 0, dues, limit=8, budget=1.5, now=0.0) == 0
