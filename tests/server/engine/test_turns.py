"""Priorities: who goes first, and what the others keep."""

import math
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.elastic.simulated import Image
from server.engine.places import Places
from server.engine.scheduler import Scheduler
from server.engine.turns import HIGH, LOW, NORMAL, Turns
from server.errors import QueueFullError, TooLargeError
from tests.server.works import PATIENCE, Exact, controller, image, settle, submit_one

SHARE = 0.1


def work(name: str = "work", seconds: float = 1.0) -> Exact:
    made = Exact(name=name, controller=controller())
    for size in (1, 2, 4, 8):
        made.controller.times.measured(0, size, size * seconds)
    return made


def scheduler(*images: Image, max_batch: int = 8, share: float = SHARE) -> Scheduler:
    made = Scheduler(max_batch, share=share)
    for each in images:
        made.add(each)
    return made


def numbers(batch) -> list[int]:
    return [job.number for job in batch.jobs]


def test_the_highest_priority_goes_first_whatever_is_due():
    a, b = work("a"), work("b")
    waiting = scheduler(
        Image(a, 0, due=5, number=0, priority=LOW),
        Image(a, 0, due=6, number=1, priority=NORMAL),
        Image(b, 0, due=90, number=2, priority=HIGH),
        Image(b, 0, due=80, number=3, priority=HIGH),
        max_batch=1,
        share=0.0,
    )
    taken = [numbers(waiting.take(now=0)) for _ in range(2)]
    assert taken == [[3], [2]]


def test_lower_ones_ride_along_where_there_is_room():
    same = work()
    waiting = scheduler(
        *(Image(same, 0, due=math.inf, number=i, priority=p) for i, p in enumerate((2, 1, 0, 1))),
        max_batch=3,
    )
    assert numbers(waiting.take(now=0)) == [2, 1, 3]
    assert len(waiting) == 1
    assert numbers(waiting.take(now=0)) == [0]
    assert len(waiting) == 0
    assert waiting.take(now=0) is None


def test_what_rides_along_makes_nobody_late():
    same = work()
    waiting = scheduler(
        Image(same, 0, due=3, number=0, priority=HIGH),
        *(Image(same, 0, due=math.inf, number=i, priority=LOW) for i in range(1, 8)),
    )
    assert numbers(waiting.take(now=0)) == [0]


def test_what_is_left_is_in_order_again():
    same = work()
    waiting = scheduler(
        Image(same, 0, due=9, number=0, priority=LOW),
        Image(same, 0, due=8, number=1, priority=NORMAL),
        Image(same, 0, due=7, number=2, priority=LOW),
        Image(same, 0, due=6, number=3, priority=NORMAL),
        max_batch=1,
        share=0.0,
    )
    assert [numbers(waiting.take(now=0)) for _ in range(2)] == [[3], [1]]
    assert [numbers(waiting.take(now=0)) for _ in range(2)] == [[2], [0]]


@pytest.mark.parametrize("share", [0.0, 0.1, 0.3])
@pytest.mark.parametrize("seconds", [1.0, 7.0])
def test_low_ones_keep_their_share_of_the_time(share, seconds):
    """High priority without an end: one that is done is followed by another."""
    mine, theirs = work("mine"), work("theirs", seconds)
    waiting = scheduler(max_batch=1, share=share)
    spent = {"mine": 0.0, "theirs": 0.0}
    for number in range(2000):
        waiting.add(Image(mine, 0, math.inf, 2 * number, priority=HIGH))
        waiting.add(Image(theirs, 0, math.inf, 2 * number + 1, priority=LOW))
        ran = waiting.take(now=0).work
        spent[ran.name] += 1.0 if ran.name == "mine" else seconds
    assert spent["theirs"] / sum(spent.values()) == pytest.approx(share, abs=0.01)


def test_each_lower_priority_keeps_a_share():
    turns, spent = Turns(SHARE), [0.0, 0.0, 0.0]
    for _ in range(5000):
        turn = turns.next((HIGH, NORMAL, LOW))
        spent[turn] += 1
        turns.ran(turn, 1.0, (HIGH, NORMAL, LOW))
    assert [each / 5000 for each in spent] == pytest.approx([0.8, 0.1, 0.1], abs=0.01)


def test_a_share_is_not_saved_up():
    turns = Turns(SHARE)
    for _ in range(1000):
        turns.ran(HIGH, 1.0, (HIGH,))
    ran = []
    for _ in range(10):
        ran.append(turns.next((HIGH, LOW)))
        turns.ran(ran[-1], 1.0, (HIGH, LOW))
    assert ran.count(LOW) == 1


def test_who_comes_alone_does_not_get_more():
    """Low images that come one by one, each when the last one is done."""
    turns, low = Turns(SHARE), 0
    for _ in range(1000):
        turn = turns.next((HIGH, LOW))
        turns.ran(turn, 1.0, (HIGH, LOW))
        if turn == LOW:
            low += 1
            turns.ran(HIGH, 1.0, (HIGH,))  # none waits just now
    assert low / 1000 == pytest.approx(SHARE, abs=0.02)


WAITING = st.sets(st.sampled_from((HIGH, NORMAL, LOW)), min_size=1)


@given(st.lists(st.tuples(WAITING, st.floats(0, 9)), max_size=20))
@settings(max_examples=40)
def test_a_turn_is_always_that_of_one_who_waits(batches):
    turns = Turns(SHARE)
    for waiting, seconds in batches:
        turn = turns.next(waiting)
        assert turn in waiting
        turns.ran(turn, seconds, waiting)


def test_what_is_of_lower_priority_keeps_nobody_waiting():
    a, b = work("a"), work("b")
    waiting = scheduler(
        *(Image(a, 0, due=1, number=i, priority=LOW) for i in range(4)),
        *(Image(b, 0, due=9, number=i, priority=HIGH) for i in range(4, 6)),
    )
    seconds = {
        priority: waiting.wait(a, due=5, images=1, late=False, now=0, priority=priority)
        for priority in (HIGH, NORMAL, LOW)
    }
    assert seconds == {HIGH: 1, NORMAL: 1 + 2, LOW: 5 + 2}


def test_low_priority_gets_half_of_the_places():
    places = Places(8, keep=False)
    for _ in range(4):
        places.check(1, LOW, pace=2.0)
        places.take(LOW)
    with pytest.raises(QueueFullError, match="4 of the 4 places .* for low priority") as raised:
        places.check(1, LOW, pace=2.0)
    assert raised.value.retry_after == 8
    places.check(4, NORMAL, pace=2.0)
    places.leave(LOW)
    places.check(1, LOW, pace=2.0)


def test_some_places_are_kept_for_high_priority():
    places = Places(16, keep=True)
    for _ in range(14):
        places.take(NORMAL)
    text = r"14 of 14 places in the queue are taken \(2 more are kept for high priority\); 1 would"
    with pytest.raises(QueueFullError, match=text):
        places.check(1, NORMAL, pace=0.0)
    places.check(2, HIGH, pace=0.0)
    with pytest.raises(QueueFullError, match="14 of 16 places"):
        places.check(3, HIGH, pace=0.0)


def test_more_images_than_there_are_places_are_never_taken():
    places = Places(16, keep=True)
    for priority, most in ((HIGH, 16), (NORMAL, 14), (LOW, 8)):
        places.check(most, priority, pace=0.0)
        text = f"{most + 1} images are more than the {most} places that the queue has for this"
        with pytest.raises(TooLargeError, match=text):
            places.check(most + 1, priority, pace=0.0)


def test_an_engine_runs_and_decodes_the_higher_priority_first(make):
    ran: list[float] = []

    def run(images: torch.Tensor) -> torch.Tensor:
        ran.extend(images[:, 0, 0, 0].tolist())
        return images.flatten(1)

    engine, prepared = make(max_batch=1), []
    begun, go = threading.Event(), threading.Event()

    def hold() -> torch.Tensor:
        begun.set()
        go.wait(PATIENCE)
        return image(0)()

    def note(number: int):
        def prepare() -> torch.Tensor:
            prepared.append(number)
            return image(number)()

        return prepare

    same = Exact(run)
    submit_one(engine, same, hold, math.inf)
    assert begun.wait(PATIENCE)
    for number, priority in ((1, LOW), (2, NORMAL), (3, HIGH)):
        submit_one(engine, same, note(number), 1000.0, priority=priority)
    go.set()
    settle(engine)
    engine.start()
    engine.stop()
    assert prepared == [3, 2, 1]
    assert ran == [3, 2, 0, 1]
