"""The engine with fake work and a fake clock: no model, no HTTP.

What is submitted before the engine starts is prepared in order by its one decoding thread and
waits; so nothing here depends on who is faster.
"""

import math
import threading
import weakref
from concurrent.futures import CancelledError
from functools import partial

import pytest
import torch
from torch import Tensor

from server.errors import DeadlineError, QueueFullError, UnavailableError
from tests.server.works import (
    PATIENCE,
    Double,
    Exact,
    image,
    settle,
    submit,
    submit_one,
    value,
)


def test_answers_are_those_of_the_images(make, work):
    engine = make()
    futures = [submit(engine, work, i) for i in range(10)]
    engine.start()
    assert [value(future) for future in futures] == [2 * i for i in range(10)]


def test_a_batch_holds_what_waits_up_to_its_limit(make, work):
    engine = make(max_batch=2)
    futures = [submit(engine, work, i) for i in range(5)]
    settle(engine)
    engine.start()
    assert [future.result(PATIENCE).batch_size for future in futures] == [2, 2, 2, 2, 1]
    assert [values for _, values in work.ran] == [[0, 1], [2, 3], [4]]


def test_equal_works_share_batches_and_others_do_not(make):
    ran: list[tuple[str, list[float]]] = []
    engine = make()
    for i, name in enumerate("abab"):
        submit(engine, Double(name, ran), i)
    settle(engine)
    engine.start()
    engine.stop()
    assert ran == [("a", [0, 2]), ("b", [1, 3])]


def test_the_queue_with_the_earliest_deadline_goes_first(make, clock):
    ran: list[tuple[str, list[float]]] = []
    engine = make(max_batch=2)
    for i, (name, seconds) in enumerate([("a", 30), ("b", 20), ("a", 10), ("b", 40), ("a", 50)]):
        submit(engine, Double(name, ran), i, clock.now + seconds)
    settle(engine)
    engine.start()
    engine.stop()
    # Within a queue too: 2 is due before 0.
    assert ran == [("a", [2, 0]), ("b", [1, 3]), ("a", [4])]


def test_of_equal_deadlines_the_oldest_goes_first(make):
    ran: list[tuple[str, list[float]]] = []
    engine = make()
    for i, name in enumerate("bac"):
        submit(engine, Double(name, ran), i)
    settle(engine)
    engine.start()
    engine.stop()
    assert [name for name, _ in ran] == ["b", "a", "c"]


def test_only_the_guilty_of_a_failing_batch_fails(make, work):
    engine = make()
    futures = [submit(engine, work, i) for i in (1, -2, 3)]
    settle(engine)
    engine.start()
    assert value(futures[0]) == 2
    with pytest.raises(RuntimeError, match="cannot run -2"):
        futures[1].result(PATIENCE)
    assert value(futures[2]) == 6
    assert [values for _, values in work.ran] == [[1, -2, 3], [1], [-2], [3]]


def test_an_image_that_fits_no_batch_fails_alone(make, work):
    engine = make()
    good = submit(engine, work, 1)
    bad = submit_one(engine, work, lambda: torch.zeros(3, 9, 9), math.inf)
    odd = submit_one(engine, work, lambda: torch.zeros(0), math.inf)
    settle(engine)
    engine.start()
    assert value(good) == 2
    assert bad.result(PATIENCE).batch_size == 1
    with pytest.raises(IndexError):
        odd.result(PATIENCE)


def test_a_forward_that_returns_too_little_is_an_error(make):
    engine = make()
    future = submit_one(engine, Exact(lambda images: images[:0]), image(1), math.inf)
    engine.start()
    with pytest.raises(ValueError, match="shorter"):
        future.result(PATIENCE)


def test_an_image_that_cannot_be_prepared_fails_alone(make, work):
    engine = make()
    good = submit(engine, work, 1)
    settle(engine)  # its own image cannot be prepared
    engine.start()
    assert value(good) == 2


def test_what_is_late_is_dropped_before_inference(make, work, clock):
    engine = make()
    late = submit(engine, work, 1, clock.now + 1)
    in_time = submit(engine, work, 2, clock.now + 9)
    settle(engine)
    clock.now += 5
    engine.start()
    with pytest.raises(DeadlineError, match="too little time was left for inference"):
        late.result(PATIENCE)
    assert value(in_time) == 4
    assert work.ran == [("work", [2])]


def test_what_is_late_is_not_even_prepared(make, work, clock):
    engine = make()
    go = threading.Event()
    submit_one(engine, work, lambda: go.wait(PATIENCE) and image(0)(), math.inf)
    prepared: list[bool] = []
    late = submit_one(engine, work, lambda: prepared.append(True) or image(1)(), clock.now + 1)
    clock.now += 5
    go.set()
    with pytest.raises(DeadlineError):
        late.result(PATIENCE)
    assert not prepared


def test_the_most_urgent_image_is_prepared_first(make, work, clock):
    engine = make()
    begun, go = threading.Event(), threading.Event()
    submit_one(engine, work, lambda: begun.set() or (go.wait(PATIENCE) and image(0)()), math.inf)
    assert begun.wait(PATIENCE)
    prepared: list[int] = []

    def note(number: int) -> Tensor:
        prepared.append(number)
        return image(number)()

    for number, seconds in ((1, math.inf), (2, 30), (3, 20), (4, 40)):
        submit_one(engine, work, partial(note, number), clock.now + seconds)
    go.set()
    settle(engine)
    assert prepared == [3, 2, 4, 1]


def test_the_upload_of_an_image_that_is_given_up_is_free_at_once(make, work):
    class Upload:
        def __call__(self) -> Tensor:
            return image(1)()

    engine = make()
    begun, go = threading.Event(), threading.Event()
    submit_one(engine, work, lambda: begun.set() or (go.wait(PATIENCE) and image(0)()), math.inf)
    assert begun.wait(PATIENCE)
    upload = Upload()
    held = weakref.ref(upload)
    future = submit_one(engine, work, upload, math.inf)
    del upload
    assert held() is not None
    future.cancel()
    assert held() is None
    go.set()


def test_what_is_given_up_is_dropped_before_inference(make, work):
    engine = make()
    futures = [submit(engine, work, i) for i in range(3)]
    settle(engine)
    assert futures[1].cancel()
    engine.start()
    assert [value(futures[0]), value(futures[2])] == [0, 4]
    assert work.ran == [("work", [0, 2])]
    with pytest.raises(CancelledError):
        futures[1].result(PATIENCE)


def test_what_is_given_up_while_it_is_prepared_does_not_run(make, work):
    engine = make()
    begun, go = threading.Event(), threading.Event()

    def slow() -> Tensor:
        begun.set()
        go.wait(PATIENCE)
        return image(1)()

    future = submit_one(engine, work, slow, math.inf)
    assert begun.wait(PATIENCE)
    assert future.cancel()
    go.set()
    engine.start()
    engine.stop()
    assert work.ran == []


def test_a_running_forward_is_not_given_up(make):
    engine = make()
    begun, go = threading.Event(), threading.Event()

    def run(images: Tensor) -> Tensor:
        begun.set()
        go.wait(PATIENCE)
        return images.flatten(1)

    engine.start()
    future = submit_one(engine, Exact(run), image(1), math.inf)
    assert begun.wait(PATIENCE)
    assert not future.cancel()
    go.set()
    assert future.result(PATIENCE).batch_size == 1


def test_places_are_bounded_and_come_free(make, work):
    engine = make(max_queue=2)
    first, second = submit(engine, work, 1), submit(engine, work, 2)
    with pytest.raises(
        QueueFullError, match="2 of 2 places in the queue are taken; 1 would be needed"
    ):
        submit(engine, work, 3)
    with pytest.raises(QueueFullError):
        engine.check_room()
    first.cancel()
    third = submit(engine, work, 3)
    engine.start()
    assert [value(second), value(third)] == [4, 6]
    engine.check_room()


def test_a_full_queue_says_when_to_come_back(make, clock):
    engine = make(max_queue=4)

    def slow(images: Tensor) -> Tensor:
        clock.now += 3 * len(images)
        return images.flatten(1)

    engine.start()
    answer = submit_one(engine, Exact(slow), image(1), math.inf).result(PATIENCE)
    assert answer.inference == 3
    go = threading.Event()
    for _ in range(4):
        submit_one(engine, Exact(slow), partial(go.wait, PATIENCE), math.inf)
    with pytest.raises(QueueFullError) as raised:
        engine.check_room()
    assert raised.value.retry_after == 12  # 4 images, 3 seconds each
    go.set()


def test_times_are_told(make, clock):
    engine = make()

    def prepare() -> Tensor:
        clock.now += 1
        return image(1)()

    def run(images: Tensor) -> Tensor:
        clock.now += 4
        return images.flatten(1)

    future = submit_one(engine, Exact(run), prepare, math.inf)
    settle(engine)
    clock.now += 2
    engine.start()
    answer = future.result(PATIENCE)
    assert (answer.decode, answer.queue, answer.inference) == (1, 2, 4)


def test_the_worker_survives_its_own_errors(make, work, monkeypatch, caplog):
    engine = make()
    run = engine._run
    monkeypatch.setattr(engine, "_run", lambda *batch: 1 / 0)
    lost = submit(engine, work, 1)
    engine.start()
    with pytest.raises(ZeroDivisionError):
        lost.result(PATIENCE)
    assert "goes on after an error of its own" in caplog.text
    monkeypatch.setattr(engine, "_run", run)
    assert value(submit(engine, work, 2)) == 4


def test_silence_grows_while_a_batch_runs(make, clock):
    engine = make()
    heard: list[float] = []

    def run(images: Tensor) -> Tensor:
        clock.now += 7
        heard.append(engine.silence)
        return images.flatten(1)

    engine.start()
    submit_one(engine, Exact(run), image(1), math.inf).result(PATIENCE)
    assert heard == [7]


def test_stopping_answers_what_has_come_and_refuses_what_comes(make, work):
    engine = make(max_batch=1)
    futures = [submit(engine, work, i) for i in range(5)]
    engine.start()
    assert engine.running
    engine.stop()
    assert [future.done() for future in futures] == [True] * 5
    assert not engine.running
    with pytest.raises(UnavailableError, match="shutting down"):
        submit(engine, work, 1)


def test_an_idle_worker_waits_for_company_if_told_to(make, work):
    engine = make(max_batch=2, max_wait=30)
    engine.start()
    first = submit(engine, work, 1)
    second = submit(engine, work, 2)
    # Long before its 30 seconds are over the batch is full.
    assert first.result(PATIENCE).batch_size == second.result(PATIENCE).batch_size == 2


def test_the_wait_for_company_ends_where_an_image_would_be_late(make, clock):
    ran = threading.Event()
    engine = make(max_batch=2, max_wait=math.inf)
    work = Exact(lambda images: ran.set() or images.flatten(1))
    work.controller.times.measured(0, 1, 2.0)
    engine.start()
    submit_one(engine, work, image(1), clock.now + 2.0)  # not a moment to spare
    assert ran.wait(PATIENCE)


def test_a_stop_ends_the_wait_for_company(make, work):
    engine = make(max_batch=2, max_wait=30)
    engine.start()
    future = submit(engine, work, 1)
    engine.stop()
    assert value(future) == 2


def test_an_idle_worker_keeps_no_images(make):
    kept: list[weakref.ref[Tensor]] = []

    def prepare() -> Tensor:
        made = image(1)()
        kept.append(weakref.ref(made))
        return made

    engine = make()
    engine.start()
    submit_one(engine, Exact(lambda images: [0] * len(images)), prepare, math.inf).result(PATIENCE)
    assert engine.call(lambda: [each() for each in kept]).result(PATIENCE) == [None]


def test_forwards_run_without_gradients_and_on_one_thread_unless_they_take_more(make, two_threads):
    seen: list[tuple[bool, int]] = []
    prepared: list[int] = []

    def run(images: Tensor) -> Tensor:
        seen.append((torch.is_inference_mode_enabled(), torch.get_num_threads()))
        return images.flatten(1)

    def prepare() -> Tensor:
        prepared.append(torch.get_num_threads())
        return image(1)()

    engine = make(max_batch=1)
    futures = [submit_one(engine, Exact(run), prepare, math.inf) for _ in range(2)]
    settle(engine)
    torch.set_num_threads(2)  # the pool has set one, for threads to come
    engine.start()
    for future in futures:
        future.result(PATIENCE)
    assert seen == [(True, 1)] * 2
    assert prepared == [1, 1]
