"""From what a request asks for to work for the engine, and to its answer.

What every route that runs a model shares: the parameters of a rate, deadlines, waiting.
"""

import asyncio
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Any

from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import ClientDisconnect, Request
from torch import Tensor

from server.engine.engine import Engine
from server.engine.job import Answer
from server.engine.scheduler import Work
from server.errors import DeadlineError, ParameterError, UploadTimeoutError
from server.models import pictures
from server.models.served import AutoWork, RateWork, ServedModel
from server.observe.log import note
from server.settings import Settings
from server.v1 import answers, uploads
from server.web.access import charge
from server.web.serving import Serving
from tocom import TocomError

AUTO = "auto"


class RateQuery(BaseModel):
    """Which model a request wants, at which rate and by when; nothing is ignored."""

    # A misspelt rate must not be answered at another one.
    model_config = ConfigDict(extra="forbid")

    rate: str = Field(
        default="0",
        description="tokens merged per block, a whole number from 0 (the stock model) to the "
        "model's `max_rate`; higher is cheaper. `auto`: the server chooses the lowest that keeps "
        "the deadline",
        examples=["8"],
    )
    min_rate: int | None = Field(
        default=None, ge=0, description="lowest rate that `auto` may choose"
    )
    max_rate: int | None = Field(
        default=None, ge=0, description="highest rate that `auto` may choose: a floor of quality"
    )
    deadline_ms: int | None = Field(
        default=None, gt=0, le=600_000, description="milliseconds after which no answer is wanted"
    )
    model: str | None = Field(default=None, description="model to ask; default: the first")
    compensate: bool = Field(
        default=True, description="make up for the difference of rates with the model's bank"
    )


class ClassifyQuery(RateQuery):
    """Parameters of a classification."""

    top_k: int | None = Field(default=None, ge=1, description="number of predictions")
    logits: bool = Field(default=False, description="also return the logits of all classes")
    merge_map: bool = Field(default=False, description="also return which patches became one token")


class Deadline:
    """When an answer is wanted, in the engine's time.

    Attributes:
        arrived: when the request did.
        wanted_ms: milliseconds from then until its answer is of no more use.
        due: when its answer should be there: what is urgent goes by it.
        at: when its answer is of no more use.
    """

    def __init__(self, engine: Engine, wanted_ms: int | None, settings: Settings) -> None:
        """Start now; `wanted_ms` is what the request said."""
        self._clock = engine.clock
        self.arrived = engine.clock()
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
) -> RateWork | AutoWork:
    """Return the work that a request asks for.

    Raises:
        RateError: if the model does not run at the rate.
        ParameterError: if `auto` is not to be had, or not in the range that is asked for.
    """
    bounds = {"min_rate": query.min_rate, "max_rate": query.max_rate}
    if query.rate != AUTO:
        for name, value in bounds.items():
            if value is not None:
                raise ParameterError(
                    f"{name} is for rate=auto, and the rate is {query.rate[:40]!r}"
                )
        return model.at(model.parse_rate(query.rate), query.compensate, trace)
    if not settings.auto:
        raise ParameterError("this server does not choose rates: ask for an exact one")
    for name, value in bounds.items():
        if value is not None and value > model.max_rate:
            raise ParameterError(
                f"{name} must be in 0..{model.max_rate} for the model {model.name!r}, got {value}"
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


def prepare(data: bytes, model: ServedModel, settings: Settings) -> Tensor:
    """Decode an uploaded image and bring it into the form [3, H, W] that the model wants.

    Raises:
        ServerError: what `pictures.decode` raises.
    """
    least_side = model.least_side if settings.reduce_jpegs else None
    image: Tensor = model.transform(pictures.decode(data, settings.max_pixels, least_side))
    return image


@dataclass(frozen=True)
class Asked:
    """What became of the images of a request, in their order.

    Attributes:
        outcomes: an answer, or why there is none, for each.
        single: whether the request was for one image, to be answered by itself.
        deadline: the request's.
    """

    outcomes: Sequence[Answer | TocomError]
    single: bool
    deadline: Deadline


async def ask(request: Request, serving: Serving, query: RateQuery, trace: bool = False) -> Asked:
    """Read the images of a request, run them and wait for what comes out.

    Args:
        request: holds the images.
        serving: has the model.
        query: which model, rate and deadline.
        trace: whether to follow which tokens merge.

    Raises:
        ServerError: if the images cannot be read or taken; or if the only one fails.
        ClientDisconnect: if nobody waits for the answer any more.
    """
    settings, engine = serving.settings, serving.engine
    deadline = Deadline(engine, query.deadline_ms, settings)
    model = serving.models.get(query.model)
    work = work_for(model, query, settings, trace)
    note(request, model=model.name, rate=query.rate)
    engine.check_room()  # before the body is read: what cannot be taken need not be sent
    try:
        upload = await asyncio.wait_for(uploads.read_images(request, settings), deadline.left)
    except asyncio.TimeoutError:
        raise UploadTimeoutError(
            f"the request body did not arrive within {deadline.wanted_ms} ms"
        ) from None
    engine.check_room(len(upload.images))
    charge(request, len(upload.images) - 1)
    waiting = _preparations(upload.images, model, settings)
    outcomes = await answer_all(request, engine, work, waiting, deadline)
    first = outcomes[0]
    if isinstance(first, Answer):
        note(request, **answers.notes(first))
    elif upload.single:
        raise first
    return Asked(outcomes, upload.single, deadline)


def _preparations(
    data: list[bytes], model: ServedModel, settings: Settings
) -> Iterator[Callable[[], Tensor]]:
    """Yield what prepares each image; its bytes leave the list, to go once it is decoded."""
    while data:
        yield partial(prepare, data.pop(0), model, settings)


async def answer_all(
    request: Request,
    engine: Engine,
    work: Work,
    preparations: Iterable[Callable[[], Tensor]],
    deadline: Deadline,
) -> list[Answer | TocomError]:
    """Run the images of a request; each is answered, or fails, by itself.

    Args:
        request: is watched for its client's going.
        engine: runs them.
        work: what to do with each.
        preparations: makes each image.
        deadline: of all.

    Raises:
        QueueFullError, UnavailableError: if not all of them were taken; none is run then.
        ClientDisconnect: if nobody waits for them any more.
    """
    futures: list[Future[Answer]] = []
    gone = asyncio.create_task(until_gone(request))
    try:
        for preparation in preparations:
            # One by one: what was taken must be known if a later one is refused.
            futures.append(engine.submit(work, preparation, deadline.at, deadline.due))  # noqa: PERF401
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


def _outcome(future: Future[Answer]) -> Answer | TocomError:
    """Return what became of an image whose time has come."""
    if not future.done():
        return DeadlineError("the deadline passed before the answer was there")
    error = future.exception()
    if error is None:
        return future.result()
    if isinstance(error, TocomError):
        return error
    raise error


async def until_gone(request: Request) -> None:
    """Return once the client has closed its connection; what is left of the body is dropped."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
