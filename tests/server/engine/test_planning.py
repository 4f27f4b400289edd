"""What an engine knows of the future and tells of the past: times, open rates, load, notes."""

import math
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
from torch import Tensor

from server.engine.scheduler import Scheduler
from server.engine.turns import HIGH, LOW, NORMAL
from server.errors import DeadlineError, QueueFullError, ShortDeadlineError, UnavailableError
from tests.server.works import (
    PATIENCE,
    Double,
    Exact,
    Open,
    controller,
    image,
    settle,
    submit,
    submit_one,
)


def test_what_would_be_answered_too_late_is_refused_at_once(make, clock):
    engine = make()
    work = Exact(lambda images: images.flatten(1))
    work.controller.times.measured(0, 1, 2.0)
    submit(engine, work, 1, clock.now + 2.5)
    settle(engine)
    with pytest.raises(QueueFullError, match="will take 4 s, and the answer is wanted in 3 s"):
        submit(engine, work, 2, clock.now + 3)
    assert submit(engine, work, 3, clock.now + 5)


def test_a_deadline_that_an_idle_server_cannot_keep_is_the_clients_mistake(make, clock):
    engine = make()
    work = Exact(lambda images: images.flatten(1))
    work.controller.times.measured(0, 1, 2.0)
    text = "an image takes about 2 s on this server even when nothing else waits, and 1 s are left"
    with pytest.raises(ShortDeadlineError, match=text):
        submit(engine, work, 1, clock.now + 1)
    with pytest.raises(ShortDeadlineError, match="2 images take about 4 s .* 3 s are left"):
        engine.submit_all(work, [image(1), image(2)], clock.now + 3)
    with pytest.raises(DeadlineError, match="the deadline passed before the images were there"):
        submit(engine, work, 1, clock.now)
    assert engine.load().taken == 0
    submit(engine, work, 1, clock.now + 2)
    settle(engine)
    with pytest.raises(QueueFullError, match="what waits will take 4 s"):  # it was not too short
        submit(engine, work, 2, clock.now + 3)


def test_what_is_due_later_keeps_nobody_waiting(make, clock):
    engine = make()
    work = Exact(lambda images: images.flatten(1))
    work.controller.times.measured(0, 1, 2.0)
    for i in range(8):
        submit(engine, work, i)  # due at no time
    settle(engine)
    urgent = submit(engine, work, 9, clock.now + 3)
    engine.start()
    assert urgent.result(PATIENCE).batch_size == 1  # with others it would be late


def test_batches_leave_room_for_who_may_come(make):
    engine = make(slo=6.1)
    work = Exact(lambda images: images.flatten(1))
    work.controller.times.measured(0, 1, 1.0)
    futures = [submit(engine, work, i) for i in range(4)]
    settle(engine)
    engine.start()
    assert [future.result(PATIENCE).batch_size for future in futures] == [2] * 4


def test_an_open_rate_is_chosen_for_the_batch_and_told(make, clock):
    ran: list[float] = []

    def run(images: Tensor) -> Tensor:
        ran.extend(images[:, 0, 0, 0].tolist())
        return images.flatten(1)

    engine = make()
    work = Open(function=run, controller=controller())
    for rate in (0, 16):
        work.controller.times.measured(rate, 1, 2.0 - rate / 16)
    relaxed = submit_one(engine, work, image(1), math.inf)
    settle(engine)
    engine.start()
    assert (relaxed.result(PATIENCE).work.rate, relaxed.result(PATIENCE).reason) == (0, "quality")
    # 2 s at rate 0 do not fit into what may be planned with of 2.2 s.
    urgent = submit_one(engine, work, image(2), math.inf, due=clock.now + 2.2).result(PATIENCE)
    assert 0 < urgent.work.rate < 16
    assert urgent.reason == "deadline"
    assert ran == [1, 2]


def test_what_ran_is_measured(make, clock):
    def slow(images: Tensor) -> Tensor:
        clock.now += 3
        return images.flatten(1)

    work = Exact(slow)
    engine = make()
    engine.start()
    submit_one(engine, work, image(1), math.inf).result(PATIENCE)
    engine.call(lambda: None).result(PATIENCE)  # the batch is over, its notes taken
    assert work.controller.times.batch(0, 1) == 3


def test_functions_are_called_on_the_worker(make):
    engine = make()
    with pytest.raises(UnavailableError, match="not running"):
        engine.call(threading.get_ident)
    engine.start()
    assert engine.call(threading.get_ident).result(PATIENCE) == engine._worker.ident
    failing = engine.call(lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        failing.result(PATIENCE)


class Notes:
    def __init__(self) -> None:
        self.taken: list[tuple] = []

    def decoded(self, work, seconds):
        self.taken.append(("decoded", seconds))

    def ran(self, work, reason, shape, seconds, queued):
        self.taken.append(("ran", work.rate, reason, shape, seconds, list(queued)))

    def failed(self, work, stage):
        self.taken.append(("failed", stage))

    def missed(self, work, stage):
        self.taken.append(("missed", stage))

    def cancelled(self, work):
        self.taken.append(("cancelled",))


def test_an_observer_is_told_what_happens(make, work, clock):
    notes = Notes()
    engine = make(observer=notes)
    good, late = submit(engine, work, 1), submit(engine, work, 2, clock.now + 1)
    bad, given_up = submit(engine, work, -1), submit(engine, work, 3)
    settle(engine)
    given_up.cancel()
    clock.now += 1
    engine.start()
    engine.stop()
    assert good.done()
    assert late.done()
    assert bad.done()
    assert notes.taken == [
        *[("decoded", 0)] * 4,
        ("failed", "decode"),  # the one that `settle` sends
        ("cancelled",),
        ("missed", "queue"),
        ("ran", 0, "asked", (1, 3, 1, 1), 0, [1]),
        ("failed", "inference"),
    ]


def test_the_load_is_what_waits_and_what_was_taken(make, work):
    engine = make()
    submit(engine, work, 1)
    other = Double("other")
    submit(engine, other, 2)
    settle(engine)
    load = engine.load()
    assert load.taken == 2
    assert load.queued == {work: 1, other: 1}


@dataclass
class Shaped:
    work: Exact
    number: int
    shape: tuple[int, ...]
    arrived: float = 0.0
    began: float = math.inf
    due: float = 10.0
    deadline: float = math.inf
    priority: int = NORMAL


def test_images_of_one_shape_run_together():
    scheduler, work = Scheduler(max_batch=8), Exact(name="one")
    images = [Shaped(work, number, (3, 8, 8 * (1 + number % 2))) for number in range(6)]
    for each in images:
        scheduler.add(each)
    assert scheduler.queued() == {work: 6}
    scheduler.discard(images[2])
    assert [each.number for each in scheduler.take(0.0).jobs] == [0, 4]
    assert [each.number for each in scheduler.take(0.0).jobs] == [1, 3, 5]
    assert scheduler.take(0.0) is None


def gathering(ready: int, coming: list[float], priority: int = NORMAL, **job: Any) -> Scheduler:
    """A scheduler with images that are ready, and some whose preparation began at these times.

    Batches of one, two and four take 3, 5 and 9 s: a second image saves 1 s, a fourth 0.75.
    """
    scheduler, work = Scheduler(4), Exact()
    for size in (1, 2, 4):
        work.controller.times.measured(0, size, 1 + 2.0 * size)
    for number in range(ready + len(coming)):
        each = Shaped(work, number, (3, 8, 8), **{"due": 100.0, **job})
        scheduler.arrived(each, 0.0)
        if number < ready:
            scheduler.add(each)
        else:
            each.began, each.priority = coming[number - ready], priority
    return scheduler


@pytest.mark.parametrize(
    ("ready", "coming", "seconds"),
    [
        (0, [50.0], 0.0),  # there is nothing yet that would wait
        (1, [], 0.0),
        (1, [50.0], 1.0),  # what it saves
        (3, [50.0] * 9, 0.75),
        (4, [50.0] * 9, 0.0),  # no batch has more
        (1, [49.5, 30.0], 1.0),
        (1, [50.5], 0.0),  # it takes longer than it saves
        (1, [math.inf], 0.0),  # nobody knows when it will begin
    ],
)
def test_a_batch_waits_for_an_image_that_is_nearly_prepared(ready, coming, seconds):
    scheduler = gathering(ready, coming)
    assert scheduler.gather(50.0, preparing=0.7) == pytest.approx(seconds)


@pytest.mark.parametrize(
    ("due", "deadline", "seconds"),
    [
        (57.0, 57.0, 1.0),  # two take 5 s, or 6 if they are held up
        (56.4, 56.4, 0.4),
        (55.9, 55.9, 0.0),
        (40.0, 90.0, 1.0),  # late, but it may be
        (40.0, 56.4, 0.4),
        (40.0, 45.0, 0.0),
    ],
)
def test_it_waits_no_longer_than_its_first_image_can_spare(due, deadline, seconds):
    scheduler = gathering(1, [50.0], due=due, deadline=deadline)
    assert scheduler.gather(50.0, preparing=0.5) == pytest.approx(seconds)


def test_it_waits_for_each_anew_and_for_all_no_longer_than_a_single_one_takes():
    scheduler = gathering(1, [])
    scheduler.max_batch = 16
    (work,) = scheduler.queued()
    jobs = [
        Shaped(work, number, (3, 8, 8), began=50 + 0.5 * number, due=1000.0) for number in range(7)
    ]
    for job in jobs:
        scheduler.arrived(job, 0.0)
    for job, seconds in zip(jobs, [1.0, 1.25, 0.75, 0.75, 0.75, 0.5], strict=False):
        assert scheduler.gather(job.began, preparing=0.5) == pytest.approx(seconds)
        scheduler.add(job)
    assert scheduler.gather(53.0, preparing=0.5) == 0.0
    scheduler.take(53.0)
    scheduler.add(Shaped(work, 7, (3, 8, 8), due=1000.0))  # and so does the next batch
    assert scheduler.gather(53.1, preparing=0.5) == pytest.approx(1.0)


def test_it_waits_for_nothing_of_a_lower_priority():
    assert gathering(1, [50.0], priority=LOW).gather(50.0, preparing=1.0) == 0.0
    assert gathering(1, [50.0], priority=HIGH).gather(50.0, preparing=1.0) == 1.0


def test_the_wait_of_a_batch_that_was_given_up_is_not_that_of_the_next():
    scheduler = gathering(1, [50.0])
    assert scheduler.gather(50.0, preparing=0.7) == 1.0
    (work,) = scheduler.queued()
    for number in range(2):
        scheduler.discard(Shaped(work, number, (3, 8, 8), due=100.0))
    assert scheduler.take(51.0) is None
    for number in range(2, 4):
        scheduler.arrived(Shaped(work, number, (3, 8, 8), began=90.0), 90.0)
    scheduler.add(Shaped(work, 2, (3, 8, 8), arrived=60.0, due=190.0))
    assert scheduler.gather(90.0, preparing=0.7) == 1.0


def test_what_is_more_urgent_ends_the_wait_of_others():
    scheduler = gathering(1, [50.0])
    assert scheduler.gather(50.0, preparing=1.0) > 0
    scheduler.add(Shaped(Exact(name="other"), 99, (3, 8, 8), due=60.0))
    assert scheduler.gather(50.5, preparing=1.0) == 0.0


def test_an_image_that_is_ready_waits_for_the_next_in_the_engine(make, work, clock):
    engine = make(decode_threads=2)
    for size in (1, 2):
        work.controller.times.measured(0, size, 1000.0)

    def after(event: threading.Event | None, seconds: float = 0.0) -> Callable[[], Tensor]:
        def prepare() -> Tensor:
            begun.release()
            if event is not None:
                assert event.wait(PATIENCE)
            clock.now += seconds
            return image(1)()

        return prepare

    begun, known = threading.Semaphore(0), threading.Event()
    engine.start()
    assert submit_one(engine, work, after(None, 1.0), math.inf).result(PATIENCE).batch_size == 1
    begun.acquire()
    both = [submit_one(engine, work, after(known), math.inf)]
    assert begun.acquire(timeout=PATIENCE)
    both.append(submit_one(engine, work, after(None), math.inf))
    assert begun.acquire(timeout=PATIENCE)
    known.set()
    assert [each.result(PATIENCE).batch_size for each in both] == [2, 2]


def test_what_cannot_be_in_time_makes_nobody_late():
    scheduler, work = Scheduler(max_batch=8), Exact(name="one")
    work.controller.times.measured(0, 1, 2.0)
    due = (4.0, 5.0, 7.0, 9.0)
    for number, at in enumerate(due):
        scheduler.add(Shaped(work, number, (3, 8, 8), due=at, deadline=at))
    scheduler.add(Shaped(work, 4, (3, 8, 8), due=4.0))  # wanted afterwards, too
    assert [each.number for each in scheduler.give_up(4.0)] == [0, 1]
    assert scheduler.queued() == {work: 3}
    # The last one runs all the same: who knows how long it takes today.
    assert [each.number for each in scheduler.give_up(8.0)] == [2]
    assert scheduler.take(8.0).jobs[-1].number == 3


def test_who_is_given_up_is_told_and_the_others_are_in_time(make, clock):
    engine = make()
    work = Exact(lambda images: images.flatten(1))
    work.controller.times.measured(0, 1, 2.0)
    late = submit(engine, work, 1, clock.now + 2.5)
    in_time = submit(engine, work, 2, clock.now + 5)
    settle(engine)
    clock.now += 1
    engine.start()
    with pytest.raises(DeadlineError, match="too little time was left for inference"):
        late.result(PATIENCE)
    assert in_time.result(PATIENCE).batch_size == 1
    assert engine.load().taken == 0


def test_who_is_refused_counts_as_arriving(make, clock):
    engine = make(max_queue=1)
    work = Open(function=lambda images: images.flatten(1), controller=controller())
    work.controller.times.measured(0, 1, 2.0)
    submit(engine, work, 1)
    once = work.controller.load(0, clock.now)
    with pytest.raises(QueueFullError, match="1 of 1 places"):
        submit(engine, work, 2)
    assert work.controller.load(0, clock.now) == pytest.approx(2 * once)


def crowd(late: bool) -> tuple[Scheduler, Exact]:
    """Twelve images, of which the first have too little time for the others to be in time."""
    scheduler, work = Scheduler(8, slo=1.5), Exact()
    for size in (1, 2, 4, 8):
        work.controller.times.measured(0, size, 0.1 + 0.05 * size)
    for number in range(12):
        due = 0.2 + 0.06 * number
        deadline = math.inf if late else due
        scheduler.add(
            Shaped(work, number, (3, 8, 8), arrived=due - 1.5, due=due, deadline=deadline)
        )
    return scheduler, work


def test_only_images_that_are_of_no_use_later_are_left_behind():
    scheduler, _ = crowd(late=False)
    assert scheduler.take(0.0).jobs[0].number > 0
    scheduler, _ = crowd(late=True)
    assert scheduler.take(0.0).jobs[0].number == 0


def test_where_images_are_left_behind_lower_priorities_do_not_ride_along():
    scheduler, work = crowd(late=False)
    for number in range(12, 24):
        scheduler.add(Shaped(work, number, (3, 8, 8), due=0.1, deadline=9.0, priority=LOW))
    batch = scheduler.take(0.0)
    assert batch.jobs[0].number > 0
    assert {job.priority for job in batch.jobs} == {NORMAL}
