"""Classes and features of images, over HTTP."""

from collections.abc import Callable
from typing import Annotated, TypeVar

from fastapi import APIRouter, Query, Request
from pydantic import BaseModel

from server.engine.job import Answer
from server.inference.query import ClassifyQuery, EmbedQuery, RateQuery
from server.inference.run import Deadline, model_of, top_k
from server.models.served import ServedModel
from server.observe.notes import INFERENCE
from server.schemas import Classification, Classifications, Embedding, Embeddings, Problem
from server.v1 import answers, uploads
from server.v1.running import asked_for, run
from server.web.access import priority_of
from server.web.body import in_time
from server.web.problems import described, problem_of
from server.web.serving import Serving, ServingDep

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
    model = model_of("embedding", query.model, serving.models)

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
    settings, engine = serving.settings, serving.engine
    deadline = Deadline(engine, query.deadline_ms, settings)
    work = asked_for(request, serving, model, query, trace)
    # Before the body is read: what cannot be taken need not be sent.
    engine.check_room(priority=priority_of(request))
    reading = uploads.read_images(request, settings)
    upload = await in_time(reading, deadline.left, deadline.wanted_ms)
    outcomes = await run(request, serving, work, upload.images, deadline)
    if upload.single and isinstance(outcomes[0], Exception):
        raise outcomes[0]
    told = [
        describe(outcome, deadline.spent)
        if isinstance(outcome, Answer)
        else problem_of(request, outcome)
        for outcome in outcomes
    ]
    if not upload.single:
        return told
    (only,) = told
    assert not isinstance(only, Problem)
    return only
