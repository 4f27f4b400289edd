"""Images that decide their own compute: a cheap run, and dearer ones while the answer is not sure.

Each run is work like any other: it waits in the queue of its rate, shares its batches with whoever
asks for that rate, and has the image's deadline. What one run says of an image decides about the
next, so an image's company changes nothing. Without time for another run the answer that is there
stands.

Which answers are sure is calibrated: see `adapters.cascade`.
"""

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

from torch import Tensor

from adapters.cascade import Cascade, CascadePoint, margins
from server.engine.engine import Engine
from server.engine.job import Answer
from server.engine.turns import NORMAL
from server.errors import DeadlineError, ParameterError
from server.inference.query import CASCADE, RateQuery
from server.models.cascades import misfit
from server.models.served import AutoWork, RateWork, ServedModel
from tocom import TocomError

_HOW = (
    "tocom-train calibrate-cascade makes one of unlabelled pictures; put its cascade.json into the "
    "model's folder or name it as the model's cascade, and start the server again"
)


@dataclass(frozen=True)
class CascadeWork:
    """One model at several rates, the cheapest first.

    Attributes:
        model: that runs.
        runs: what an image may run as, one after the other.
        thresholds: margins with which the answers of all runs but the last stand.
    """

    model: ServedModel
    runs: tuple[RateWork, ...]
    thresholds: tuple[float, ...]
    rate: ClassVar[str] = CASCADE


def cascade_work(model: ServedModel, query: RateQuery, trace: bool) -> CascadeWork:
    """Return the work that a request asks for with `rate=cascade`.

    Raises:
        ParameterError: if the model has no calibration for it, or none that is as asked for.
    """
    if query.agreement is not None and query.budget is not None:
        raise ParameterError(
            "agreement and budget both say how a cascade is to run: only one may be there, got "
            f"agreement={query.agreement:g} and budget={query.budget:g}"
        )
    cascade = _cascade(model)
    if not query.compensate and cascade.bank_digest is not None:
        raise ParameterError("compensate=false is not for rate=cascade, which its bank is part of")
    point = _point(model, cascade, query)
    runs = tuple(model.at(rate, True, trace) for rate in point.rates)
    return CascadeWork(model, runs, point.thresholds)


def _cascade(model: ServedModel) -> Cascade:
    whose = f"the model {model.name!r}{model.of_ladder}"
    if model.kind != "classification":
        raise ParameterError(
            f"rate=cascade goes by how sure a classification is, and {whose} is for {model.kind}"
        )
    if model.cascade is None:
        raise ParameterError(f"{whose} has no calibration for rate=cascade: {_HOW}")
    if (other := misfit(model)) is not None:
        raise ParameterError(f"the cascade of {whose} was calibrated for the {other}: {_HOW}")
    return model.cascade


def _point(model: ServedModel, cascade: Cascade, query: RateQuery) -> CascadePoint:
    first, last = cascade.points[0], cascade.points[-1]
    if query.budget is not None:
        if not 0 < query.budget <= 1 or (found := cascade.within(query.budget)) is None:
            raise ParameterError(
                "the budget of a cascade is a mean share of the multiply-adds of rate 0, for the "
                f"model {model.name!r} from {first.share:.4g} to 1; got budget={query.budget:g}"
            )
        return found
    agreement = query.asked_agreement
    assert agreement is not None
    if not 0 < agreement <= 1 or (found := cascade.agreeing(agreement)) is None:
        raise ParameterError(
            "agreement is the share of images answered as at rate 0, for the cascade of the model "
            f"{model.name!r} at most {last.agreement:g}; got agreement={agreement:g}"
        )
    return found


def submit_all(
    engine: Engine,
    work: RateWork | AutoWork | CascadeWork,
    prepares: list[Callable[[], Tensor]],
    deadline: float,
    due: float | None = None,
    priority: int = NORMAL,
) -> list[Future[Answer]]:
    """Let an engine take images for any work; arguments and errors as of `Engine.submit_all`."""
    if not isinstance(work, CascadeWork):
        return engine.submit_all(work, prepares, deadline, due, priority)
    images = [Climbing(engine, work, (deadline, due, priority)) for _ in prepares]
    kept: list[Callable[[], Tensor]] = [
        partial(image.prepare, prepare) for image, prepare in zip(images, prepares, strict=True)
    ]
    prepares.clear()
    runs = engine.submit_all(work.runs[0], kept, deadline, due, priority)
    for image, run in zip(images, runs, strict=True):
        image.follow(run)
    return list(images)


class Climbing(Future[Answer]):
    """An image on its way from its cheapest run to the one that it is answered by.

    Cancelling it cancels the run that it waits for.
    """

    def __init__(
        self, engine: Engine, work: CascadeWork, urgency: tuple[float, float | None, int]
    ) -> None:
        super().__init__()
        self._engine = engine
        self._work = work
        self._urgency = urgency  # deadline, due and priority of all runs
        self._image: Tensor | None = None
        self._done: tuple[Answer, ...] = ()
        # Not beyond its end: two futures that know each other would keep their images.
        self._run: Future[Answer] | None = None

    def prepare(self, prepare: Callable[[], Tensor]) -> Tensor:
        """Prepare the image, and keep it for other runs."""
        self._image = prepare()
        return self._image

    def follow(self, run: Future[Answer]) -> None:
        """Go on when a run ends."""
        self._run = run
        run.add_done_callback(self._ended)
        if self.cancelled():
            run.cancel()

    def cancel(self) -> bool:
        """Give the image up, unless it is answered; a forward that runs is not stopped."""
        # First, so that a run that begins meanwhile sees it.
        cancelled = super().cancel()
        if (run := self._run) is not None:
            run.cancel()
        self._image = None
        return cancelled

    def so_far(self) -> Answer | None:
        """Give up what still runs, and return the answer that stands; None: there is none yet.

        None, too, if the image is answered at this moment.
        """
        if not self._done or not self.cancel():
            return None
        self._count("deadline")
        return _whole(self._done, "deadline")

    def _ended(self, run: Future[Answer]) -> None:
        """Go on from a run that has ended, in the thread where it did."""
        self._run = None
        if run.cancelled() or self.cancelled():
            self._image = None
            return
        if (error := run.exception()) is not None:
            self._settle(error if not self._done or not isinstance(error, DeadlineError) else None)
            return
        self._done = (*self._done, run.result())
        if (next_run := self._next()) is None or (image := self._image) is None:
            return  # it is answered, or was given up meanwhile
        try:
            again = self._engine.submit_again(next_run, image, *self._urgency)
        except TocomError:  # no time is left, or the server ends
            self._settle(None, "deadline")
        else:
            self.follow(again)

    def _next(self) -> RateWork | None:
        """Return what the image is to run as next; None: it is answered."""
        number = len(self._done)
        if number == len(self._work.runs):
            self._settle(None, "unsure" if number > 1 else "asked")
        elif margins(self._done[-1].output.logits) >= self._work.thresholds[number - 1]:
            self._settle(None, "sure")
        else:
            return self._work.runs[number]
        return None

    def _settle(self, error: BaseException | None, reason: str = "deadline") -> None:
        """End with the answer of the last run, or with an error."""
        self._image = None
        if not self.set_running_or_notify_cancel():  # it was given up meanwhile
            return
        if error is not None:
            self.set_exception(error)
            return
        self._count(reason)  # first, for who has the answer may ask for the counts
        self.set_result(_whole(self._done, reason))

    def _count(self, reason: str) -> None:
        if self._engine.observer:
            self._engine.observer.passed([each.work for each in self._done], reason)


def _whole(runs: tuple[Answer, ...], reason: str) -> Answer:
    """Return the answer of the last run, with the times of all."""
    *before, last = runs
    return replace(
        last,
        reason=reason,
        decode=runs[0].decode,
        queue=sum(each.queue for each in runs),
        inference=sum(each.inference for each in runs),
        before=tuple(before),
    )
