"""Images on their way up a cascade, in the engine, with works that need no model."""

import math
from collections.abc import Callable
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from adapters.cascade import margins
from server.engine.engine import Engine
from server.engine.job import Answer
from server.errors import DeadlineError
from server.inference.cascade import CascadeWork, Climbing, submit_all
from server.inference.run import _outcome
from server.models.served import Output
from tests.server.works import PATIENCE, Clock, Exact, controller, settle


class Said(Exact):
    """Work whose answers lead by the image's value, a hundred times as much at rate 0."""

    def __call__(self, images: Tensor) -> list[Output]:
        leads = images[:, 0, 0, 0] * (1 if self.rate else 100)
        rows = torch.stack([leads, torch.zeros_like(leads)], dim=1)
        return [Output(row, row, None) for row in rows]


def climb(engine: Engine, values: list[float], deadline: float = math.inf) -> list[Future[Any]]:
    shared = controller()
    work = CascadeWork(
        None, (Said(rate=4, controller=shared), Said(rate=0, controller=shared)), (0.5,)
    )  # type: ignore[arg-type]
    images: list[Callable[[], Tensor]] = [
        lambda value=value: torch.full((3, 1, 1), value) for value in values
    ]
    return submit_all(engine, work, images, deadline)  # type: ignore[arg-type]


def test_runs_share_batches_with_others(make: Callable[..., Engine]) -> None:
    engine = make()
    first, second = climb(engine, [0.5, 2.0])
    settle(engine)
    engine.start()
    unsure, sure = first.result(PATIENCE), second.result(PATIENCE)
    assert (unsure.work.rate, unsure.reason, unsure.batch_size) == (0, "unsure", 1)
    assert (sure.work.rate, sure.reason, sure.batch_size) == (4, "sure", 2)
    (before,) = unsure.before
    assert before.work.rate == 4
    assert unsure.inference >= before.inference


def test_without_time_for_more_the_answer_stands(make: Callable[..., Engine], clock: Clock) -> None:
    engine = make(max_queue=1)
    (image,) = climb(engine, [0.5], deadline=clock.now + 5)
    image._work.runs[1].controller.times.measured(0, 1, 60.0)
    engine.start()
    answer = image.result(PATIENCE)
    assert (answer.work.rate, answer.reason, answer.before) == (4, "deadline", ())


def test_a_second_run_needs_no_free_place(make: Callable[..., Engine]) -> None:
    engine = make(max_queue=1)
    (image,) = climb(engine, [0.5])
    engine.start()
    assert image.result(PATIENCE).work.rate == 0
    assert engine.load().taken == 0


def test_what_fails_at_first_fails(make: Callable[..., Engine], clock: Clock) -> None:
    engine = make()
    (late,) = climb(engine, [0.5], deadline=clock.now + 5)
    settle(engine)
    clock.now += 10
    engine.start()
    with pytest.raises(DeadlineError, match="too little time was left for inference"):
        late.result(PATIENCE)


def test_an_image_that_is_given_up_runs_no_more(make: Callable[..., Engine]) -> None:
    engine = make()
    (image,) = climb(engine, [0.5])
    settle(engine)
    assert image.cancel()
    assert engine.load().taken == 0
    assert isinstance(image, Climbing)
    assert image.so_far() is None


def climbing(engine: Engine) -> Climbing:
    """An image whose first run is not there yet; it is not sure of any answer."""
    (image,) = climb(Engine(), [0.5])
    assert isinstance(image, Climbing)
    made = Climbing(engine, image._work, image._urgency)
    made.prepare(lambda: torch.zeros(3, 1, 1))
    return made


def unsure(image: Climbing) -> Answer:
    (output,) = image._work.runs[0](torch.zeros(1, 3, 1, 1))
    return Answer(output, image._work.runs[0], "asked", 0.0, 0.0, 0.0, batch_size=1)


def test_an_answer_that_stands_when_time_is_over_is_counted_once(
    make: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    counted: list[tuple[list[int], str]] = []
    engine = make()
    image, run, again = climbing(engine), Future[Answer](), Future[Answer]()
    again.set_running_or_notify_cancel()
    monkeypatch.setattr(engine, "submit_again", lambda *_: again)
    engine.observer = SimpleNamespace(
        passed=lambda works, reason: counted.append(([work.rate for work in works], reason))
    )
    assert image.so_far() is None
    image.follow(run)
    run.set_result(unsure(image))
    answer = image.so_far()
    assert answer is not None
    assert answer.reason == "deadline"
    again.set_result(unsure(image))
    assert counted == [([4], "deadline")]
    engine.observer = None


def test_an_image_may_be_given_up_while_its_run_is_judged(
    make: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    engine = make()
    image, run = climbing(engine), Future[Answer]()

    def judged(logits: Tensor) -> Tensor:
        image.cancel()
        return margins(logits)

    monkeypatch.setattr("server.inference.cascade.margins", judged)
    image.follow(run)
    run.set_result(unsure(image))
    assert image.cancelled()
    assert engine.load().taken == 0
    assert caplog.records == []


def test_an_image_may_be_given_up_while_its_run_ends(make: Callable[..., Engine]) -> None:
    engine = make()
    image = climbing(engine)

    class Ending(Future[Answer]):
        def cancel(self) -> bool:
            self.set_result(unsure(image))
            return False

    image.follow(Ending())
    assert image.cancel()
    assert engine.load().taken == 0


def test_an_image_that_is_answered_as_its_time_is_over_has_that_answer(
    make: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    image = climbing(make())
    answer = unsure(image)
    monkeypatch.setattr(image, "so_far", lambda: image.set_result(answer))
    assert _outcome(image) is answer
