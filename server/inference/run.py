"""From what a request asks for to work for the engine, and to its answers."""

import asyncio
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Any, TypeAlias

from starlette.requests import ClientDisconnect, Request
from torch import Tensor

from server.engine.engine import Engine
from server.engine.job import Answer
from server.engine.turns import NORMAL
from server.errors import DeadlineError, ParameterError, ShortDeadlineError
from server.inference.cascade import CascadeWork, Climbing, cascade_work, submit_all
from server.inference.query import AUTO, BUDGET, CASCADE, RateQuery
from server.models.registry import Registry
from server.models.served import AutoWork, RateWork, ServedModel
from server.schemas import Kind
from server.settings import Settings
from tocom import TOME

#: What may be done with an image.
AnyWork: TypeAlias = RateWork | AutoWork | CascadeWork
#: Where models of a kind are asked.
ROUTES: Mapping[Kind, str] = {
    "classification": "/v1/classify",
    "embedding": "/v1/embed",
    "segmentation": "/v1/segment",
}
#: Which models may be asked: those that classify have features, too.
_ANSWERING: Mapping[Kind, tuple[Kind, ...]] = {
    "classification": ("classification",),
    "embedding": ("classification", "embedding"),
    "segmentation": ("segmentation",),
}


class Deadline:
    """When an answer is wanted, in the engine's time.

    Attributes:
        arrived: when the request did.
        wanted_ms: milliseconds from then until its answer is of no more use.
        due: when its answer should be there: what is urgent goes by it.
        at: when its answer is of no more use.
    """

    def __init__(
        self,
        engine: Engine,
        wanted_ms: int | None,
        settings: Settings,
        arrived: float | None = None,
    ) -> None:
        """Start when the request arrived, by default now; `wanted_ms` is what it said."""
        self._clock = engine.clock
        self.arrived = engine.clock() if arrived is None else arrived
        self.wanted_ms = min(wanted_ms or settings.timeout_ms, settings.timeout_ms)
        self.at = self.arrived + self.wanted_ms / 1000
        self.due = min(self.at, self.arrived + (wanted_ms or settings.slo_ms) / 1000)

    @property
    def left(self) -> float:
        """Seconds until the answer is of no more use."""
        return self.at - self._clock()

    @property
    def spent(self) -> float:
        """Seconds since the request arrived."""
        return self._clock() - self.arrived


def work_for(
    model: ServedModel, query: RateQuery, settings: Settings, trace: bool = False
) -> AnyWork:
    """Return the work that a request asks for.

    Raises:
        UnknownLadderError: if the model has no such ladder.
        RateError: if the model does not run at the rate.
        ParameterError: if `auto` or `cascade` is not to be had, or not as it is asked for, or no
            rate is within the budget, or both are there.
    """
    model = model.on(query.ladder)
    bounds = {"min_rate": query.min_rate, "max_rate": query.max_rate}
    if query.asked == BUDGET and "rate" in query.model_fields_set:
        raise ParameterError(
            f"rate and budget both say how much an image may cost: only one may be there, got "
            f"rate={query.rate[:40]!r} and budget={query.budget:g}"
        )
    asked = "this asks for a budget"
    if query.asked != BUDGET:
        asked = f"the rate is {query.rate[:40]!r}"
    if query.asked != AUTO:
        for name, value in bounds.items():
            if value is not None:
                raise ParameterError(f"{name} is for rate=auto, and {asked}")
    if query.asked == CASCADE:
        return cascade_work(model, query, trace)
    if query.agreement is not None:
        raise ParameterError(f"agreement is for rate=cascade, and {asked}")
    if query.asked != AUTO:
        budget = query.budget
        rate = model.parse_rate(query.rate) if budget is None else model.within(budget)
        return model.at(rate, query.compensate, trace)
    if not settings.auto:
        raise ParameterError("this server does not choose rates: ask for an exact one")
    on = "" if model.ladder == TOME else f" on the ladder {model.ladder.name!r}"
    for name, value in bounds.items():
        if value is not None and value > model.max_rate:
            raise ParameterError(
                f"{name} must be in 0..{model.max_rate} for the model {model.name!r}{on}, got "
                f"{value}"
            )
    highest = model.max_rate
    if settings.auto_max_rate is not None:
        highest = min(highest, settings.auto_max_rate)
    low = max(query.min_rate or 0, settings.auto_min_rate)
    high = highest if query.max_rate is None else min(highest, query.max_rate)
    if low > high:
        raise ParameterError(
            f"no rate is at least {low} and at most {high}; this server chooses among "
            f"{settings.auto_min_rate} to {highest}"
        )
    return AutoWork(model, low, high, query.compensate and model.bank is not None, trace)


def noted(work: AnyWork) -> dict[str, str | int]:
    """Return what is noted of work before it runs."""
    rate = AUTO if work.rate is None else work.rate
    return {"model": work.model.name, "ladder": work.model.ladder.name, "rate": rate}


def model_of(kind: Kind, name: str | None, models: Registry) -> ServedModel:
    """Return the model of a name; without one, the first that is for this kind of question.

    Raises:
        UnknownModelError: naming those that there are, if no model has the name.
        ParameterError: if it is for another kind.
    """
    answering = [model for model in models.all() if model.kind in _ANSWERING[kind]]
    if name is None and answering:
        return answering[0]
    model = models.get(name)
    if model.kind not in _ANSWERING[kind]:
        there = ", ".join(each.name for each in answering) or "none"
        raise ParameterError(
            f"the model {model.name!r} is for {model.kind} ({ROUTES[model.kind]}), and this is for "
            f"{kind}; models for that: {there}"
        )
    return model


def top_k(asked: int | None, model: ServedModel, settings: Settings) -> int:
    """Return how many predictions to list.

    Raises:
        ParameterError: if `asked` is more than there are, or than the server lists.
    """
    limit = min(settings.max_top_k, len(model.backbone.class_names))
    if asked is None:
        return min(settings.top_k, limit)
    if not 1 <= asked <= limit:
        raise ParameterError(
            f"top_k must be in 1..{limit} for the model {model.name!r}, got {asked}"
        )
    return asked


async def answer_all(
    request: Request,
    engine: Engine,
    work: AnyWork,
    preparations: list[Callable[[], Tensor]],
    deadline: Deadline,
    priority: int = NORMAL,
) -> list[Answer | Exception]:
    """Run the images of a request; each is answered, or fails, by itself.

    Args:
        request: is watched for its client's going.
        engine: runs them.
        work: what to do with each.
        preparations: makes each image; taken out of the list, so that uploads are freed early.
        deadline: of all.
        priority: of all.

    Raises:
        QueueFullError, UnavailableError: if not all of them were taken; none is run then.
        ShortDeadlineError: if an idle server could not answer them in time.
        ClientDisconnect: if nobody waits for them any more.
    """
    try:
        futures = submit_all(engine, work, preparations, deadline.at, deadline.due, priority)
    except ShortDeadlineError as error:
        error.args = (f"{error} (the deadline was {deadline.wanted_ms} ms)",)
        raise
    gone = asyncio.create_task(until_gone(request))
    try:
        answered = asyncio.gather(*map(asyncio.wrap_future, futures), return_exceptions=True)
        either: set[asyncio.Future[Any]] = {answered, gone}
        await asyncio.wait(either, timeout=deadline.left, return_when=asyncio.FIRST_COMPLETED)
        if gone.done():
            raise ClientDisconnect
        return [_outcome(future) for future in futures]
    finally:
        for future in futures:
            future.cancel()  # also takes the image out of the engine's queue
        gone.cancel()


def _outcome(future: Future[Answer]) -> Answer | Exception:
    """Return what became of an image whose time has come; an error may be unforeseen."""
    if isinstance(future, Climbing) and not future.done() and (answer := future.so_far()):
        return answer
    if not future.done():
        return DeadlineError("the deadline passed before the answer was there")
    error = future.exception()
    if error is None:
        return future.result()
    assert isinstance(error, Exception)  # the engine's threads raise no others
    return error


async def until_gone(request: Request) -> None:
    """Return once the client has closed its connection; what is left of the body is dropped."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
