"""What an engine knows of the future and tells of the past: times, open rates, load, notes."""

import math
import threading
from collections.abc import Callable
from dataclasses import dataclass

import pytest
from torch import Tensor

from server.engine.scheduler import Scheduler
from server.engine.turns import NORMAL
from server.errors import DeadlineError, QueueFullError, ShortDeadlineError, UnavailableError
from tests.server.works import PATIENCE, Double, Exact, Open, controller, image, settle, submit


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
    relaxed = engine.submit(work, image(1), math.inf)
    settle(engine)
    engine.start()
    assert (relaxed.result(PATIENCE).work.rate, relaxed.result(PATIENCE).reason) == (0, "quality")
    # 2 s at rate 0 do not fit into what may be planned with of 2.2 s.
    urgent = engine.submit(work, image(2), math.inf, due=clock.now + 2.2).result(PATIENCE)
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
    engine.submit(work, image(1), math.inf).result(PATIENCE)
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

    def ran(self, work, reason, images, seconds, queued):
        self.taken.append(("ran", work.rate, reason, images, seconds, list(queued)))

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
        ("ran", 0, "asked", 1, 0, [1]),
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


@pytest.mark.parametrize(
    ("ready", "coming", "slack", "waits"),
    [
        (0, 3, 9.0, False),  # there is nothing yet that would wait
        (1, 0, 9.0, False),
        (1, 1, 9.0, True),
        (3, 9, 9.0, True),
        (4, 9, 9.0, False),  # no batch has more
        (1, 3, 2.0, False),  # nor has this one, whose first image is late with any other
    ],
)
def test_a_batch_waits_for_what_is_being_prepared_and_has_room_in_it(ready, coming, slack, waits):
    scheduler, work = Scheduler(4), Exact()
    for size in (1, 4):
        work.controller.times.measured(0, size, float(size))
    jobs = [Shaped(work, number, (3, 8, 8), due=100.0) for number in range(ready + coming)]
    for job in jobs:
        scheduler.arrived(job, 0.0)
    for job in jobs[:ready]:
        scheduler.add(job)
    assert scheduler.gathers(100.0 - slack) == waits
    scheduler.arrived(Shaped(Exact(name="other"), 99, (3, 8, 8)), 0.0)
    assert scheduler.gathers(100.0 - slack) == waits


def test_an_image_waits_for_the_next_as_long_as_preparing_one_takes(make, work, clock):
    engine = make(decode_threads=2)

    def after(event: threading.Event | None, seconds: float = 0.0) -> Callable[[], Tensor]:
        def prepare() -> Tensor:
            if event is not None:
                assert event.wait(PATIENCE)
            clock.now += seconds
            return image(1)()

        return prepare

    engine.start()
    known, slow = threading.Event(), threading.Event()
    # Nothing is known of preparing, so nothing is waited for.
    kept = engine.submit(work, after(slow), math.inf)
    assert engine.submit(work, after(None), math.inf).result(PATIENCE).batch_size == 1
    slow.set()
    assert kept.result(PATIENCE)
    # Once it takes a while, the one that is ready waits for the other.
    assert engine.submit(work, after(None, PATIENCE), math.inf).result(PATIENCE)
    both = [engine.submit(work, after(event), math.inf) for event in (None, known)]
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
