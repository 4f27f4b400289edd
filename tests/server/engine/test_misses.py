"""Which images count as too late, and where they were by then."""

import threading

import pytest
import torch
from torch import Tensor

from server.errors import DeadlineError
from tests.server.engine.test_planning import Notes
from tests.server.works import PATIENCE, Exact, image, settle, submit, submit_one


@pytest.fixture
def notes() -> Notes:
    return Notes()


def misses(notes: Notes) -> list[tuple[str, str]]:
    return [note for note in notes.taken if note[0] == "missed"]


def test_what_is_given_up_late_was_late_where_it_was(make, work, clock, notes):
    engine = make(observer=notes)
    prepared = submit(engine, work, 1, clock.now + 1)
    settle(engine)
    go = threading.Event()
    submit_one(engine, work, lambda: go.wait(PATIENCE) and image(2)(), 1000.0)
    unprepared = submit(engine, work, 3, clock.now + 1)
    clock.now += 1
    for future in (prepared, unprepared):
        assert future.cancel()
    go.set()
    assert misses(notes) == [("missed", "queue"), ("missed", "decode")]


def test_a_forward_that_ends_late_is_counted(make, clock, notes):
    def run(images: Tensor) -> Tensor:
        clock.now += 2
        return images.flatten(1)

    engine = make(observer=notes)
    engine.start()
    submit_one(engine, Exact(run), image(1), clock.now + 1).result(PATIENCE)
    engine.call(lambda: None).result(PATIENCE)
    assert misses(notes) == [("missed", "inference")]


@pytest.mark.parametrize("end", ["given up", "found late", "ran late"])
def test_an_image_that_has_an_answer_is_never_late(make, clock, notes, end):
    def run(images: Tensor) -> Tensor:
        clock.now += 2
        return images.flatten(1)

    engine, deadline = make(observer=notes), clock.now + 1
    again = engine.submit_again(Exact(run), torch.zeros(3, 1, 1), deadline, None, priority=1)
    if end != "ran late":
        clock.now = deadline
    if end == "given up":
        again.cancel()
    engine.start()
    if end == "found late":
        with pytest.raises(DeadlineError):
            again.result(PATIENCE)
    engine.stop()
    assert again.done()
    assert misses(notes) == []
