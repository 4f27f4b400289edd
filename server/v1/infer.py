"""Classes and features of images, over HTTP."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Annotated, NamedTuple, TypeVar

from fastapi import APIRouter, Query, Request
from pydantic import BaseModel
from torch import Tensor

from server.engine.job import Answer
from server.inference.query import ClassifyQuery, EmbedQuery, RateQuery
from server.inference.ran import Ran
from server.inference.run import Deadline, answer_all, model_of, noted, top_k, work_for
from server.models.pictures import prepare
from server.models.served import ServedModel
from server.observe.notes import INFERENCE, note
from server.schemas import Classification, Classifications, Embedding, Embeddings, Problem
from server.v1 import answers, uploads
from server.web.access import charge
from server.web.body import in_time
from server.web.problems import described, problem_of
from server.web.serving import Serving, ServingDep
from tocom import TocomError

Described = TypeVar("Described", bound=BaseModel)

PATHS = CLASSIFY, EMBED = "/v1/classify", "/v1/embed"

router = APIRouter(tags=[INFERENCE])


@router.post(
    CLASSIFY,
    summary="Classify images",
    # What nobody asked for (logits, a merge map) is left out; an absent bank is null.
    response_model_exclude_unset=True,
    responses=described(400, 401, 404, 408, 413, 415, 422, 429, 503, 504),
    openapi_extra={"requestBody": uploads.OPENAPI},
)
async def classify(
    request: Request, query: Annotated[ClassifyQuery, Query()], serving: ServingDep
) -> Classification | Classifications:
    """Classify images (JPEG, PNG or WebP) at the rate that the caller chooses, or `auto`.

    One image is the form field `file` or the whole body, and is answered by itself. Several are
    several fields `file`, or JSON of base64, and are answered together, in their order.
    """
    model = model_of("classification", query.model, serving.models)
    predictions = top_k(query.top_k, model, serving.settings)

    def describe(answer: Answer, seconds: float) -> Classification:
        return answers.classification(answer, query, predictions, seconds, request.state.request_id)

    told = await _ask(request, serving, model, query, describe, trace=query.merge_map)
    return Classifications(results=told) if isinstance(told, list) else told


@router.post(
    EMBED,
    summary="Embed images",
    responses=described(400, 401, 404, 408, 413, 415, 422, 429, 503, 504),
    openapi_extra={"requestBody": uploads.OPENAPI},
)
async def embed(
    request: Request, query: Annotated[EmbedQuery, Query()], serving: ServingDep
) -> Embedding | Embeddings:
    """Return the features of images at the rate that the caller chooses, or `auto`.

    Images are sent and answered as those to classify are.
    """
    model = model_of("classification", query.model, serving.models)

    def describe(answer: Answer, seconds: float) -> Embedding:
        return answers.embedding(answer, query, seconds, request.state.request_id)

    told = await _ask(request, serving, model, query, describe)
    return Embeddings(results=told) if isinstance(told, list) else told


async def _ask(
    request: Request,
    serving: Serving,
    model: ServedModel,
    query: RateQuery,
    describe: Callable[[Answer, float], Described],
    trace: bool = False,
) -> Described | list[Described | Problem]:
    """Read the images of a request, run them and describe what comes out.

    Args:
        request: holds the images.
        serving: has the engine.
        model: runs them.
        query: at which rate and by when.
        describe: makes an answer of the engine's, and of the seconds since the request arrived.
        trace: whether to follow which tokens merge.

    Returns:
        The answer to one image that was sent by itself, else one for each image, in their order.

    Raises:
        ServerError: if the images cannot be read or taken, or if the only one fails.
        ClientDisconnect: if nobody waits for the answer any more.
    """
    settings = serving.settings

    def prepared(data: bytes | bytearray) -> Callable[[], Tensor]:
        return partial(prepare, data, model, settings)

    asked = await run(request, serving, model, query, prepared, trace)
    told = [
        describe(outcome, asked.deadline.spent)
        if isinstance(outcome, Answer)
        else problem_of(request, outcome)
        for outcome in asked.outcomes
    ]
    if not asked.single:
        return told
    (only,) = told
    assert not isinstance(only, Problem)
    return only


class Asked(NamedTuple):
    """What became of the images of a request.

    Attributes:
        outcomes: of each, in their order.
        single: whether there was one that was sent by itself; it was answered then.
        deadline: of the request.
    """

    outcomes: Sequence[Answer | TocomError]
    single: bool
    deadline: Deadline


async def run(
    request: Request,
    serving: Serving,
    model: ServedModel,
    query: RateQuery,
    prepared: Callable[[bytes | bytearray], Callable[[], Tensor]],
    trace: bool = False,
) -> Asked:
    """Read the images of a request and run them; arguments and errors as of `_ask`.

    Args:
        prepared: returns what makes an image of its bytes.
    """
    settings, engine = serving.settings, serving.engine
    deadline = Deadline(engine, query.deadline_ms, settings)
    work = work_for(model, query, settings, trace)
    note(request, **noted(work))
    engine.check_room()  # before the body is read: what cannot be taken need not be sent
    reading = uploads.read_images(request, settings)
    upload = await in_time(reading, deadline.left, deadline.wanted_ms)
    charge(request, len(upload.images) - 1)
    preparations = [prepared(image) for image in upload.images]
    upload.images.clear()  # the bytes of an image are free once it is decoded
    outcomes = await answer_all(request, engine, work, preparations, deadline)
    first = outcomes[0]
    if isinstance(first, Answer):
        note(request, **Ran.of(first).notes)
    elif upload.single:
        raise first
    return Asked(outcomes, upload.single, deadline)
