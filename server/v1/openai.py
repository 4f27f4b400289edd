"""`/v1/embeddings`: features of images, for programs that were written for OpenAI's interface."""

import base64
from functools import partial
from typing import Any

import numpy as np
from fastapi import APIRouter, Request
from torch.nn import functional as F

from server.engine.job import Answer
from server.errors import ParameterError, UnsupportedTypeError
from server.inference.ran import Ran
from server.inference.run import Deadline, model_of
from server.models.served import ServedModel
from server.observe.notes import INFERENCE
from server.schemas import Problem
from server.v1 import uploads
from server.v1.openai_schemas import (
    EmbeddingItem,
    EmbeddingsRequest,
    EmbeddingsResponse,
    OpenAIError,
    OpenAIProblem,
    Usage,
)
from server.v1.running import asked_for, run, whole
from server.web.access import priority_of
from server.web.body import JSON, content_type, described_body, in_time, read
from server.web.fetching import FetcherDep
from server.web.problems import speaking
from server.web.serving import Serving, ServingDep

PATH = "/v1/embeddings"

#: OpenAI's name of an error, by its status; of others below 500 it is the request's fault.
TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}


def error_of(problem: Problem) -> dict[str, Any]:
    """Return a problem as OpenAI's clients read it."""
    kind = TYPES.get(problem.status)
    if kind is None:
        kind = "invalid_request_error" if problem.status < 500 else "server_error"
    code = problem.title.lower().replace(" ", "_")
    error = OpenAIError(message=problem.detail, type=kind, param=None, code=code)
    return OpenAIProblem(error=error).model_dump()


router = APIRouter(tags=[INFERENCE], route_class=speaking(error_of))


@router.post(
    PATH,
    summary="Embed images, as OpenAI's clients ask for it",
    responses={
        status: {"model": OpenAIProblem}
        for status in (400, 401, 403, 404, 408, 413, 415, 422, 429, 503, 504)
    },
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {JSON: {"schema": described_body(EmbeddingsRequest)}},
        }
    },
)
async def embeddings(
    request: Request, serving: ServingDep, fetcher: FetcherDep
) -> EmbeddingsResponse:
    """Return the features of images that are sent as data: URIs, at the rate that is asked for.

    If one image fails the request does, and the error says which.
    """
    arrived = serving.engine.clock()
    # Before the body is read: what cannot be taken need not be sent.
    serving.engine.check_room(priority=priority_of(request))
    question = await _read(request, serving)
    model = model_of("embedding", question.model, serving.models)
    _check_dimensions(question.dimensions, model)
    work = asked_for(request, serving, model, question)
    deadline = Deadline(serving.engine, question.deadline_ms, serving.settings, arrived)
    async with fetcher.files(question.images, deadline.left) as images:
        answers = whole(await run(request, serving, work, images, deadline), "image")
    tokens = sum(Ran.of(answer).cost.plan.tokens_in for answer in answers)
    return EmbeddingsResponse(
        data=[_item(index, answer, question) for index, answer in enumerate(answers)],
        model=model.name,
        usage=Usage(prompt_tokens=tokens, total_tokens=tokens),
    )


async def _read(request: Request, serving: Serving) -> EmbeddingsRequest:
    settings = serving.settings
    # OpenAI's clients always say it.
    if content_type(request) != JSON:
        raise UnsupportedTypeError(f"this takes JSON: send it as Content-Type: {JSON}")
    body = await in_time(read(request), settings.timeout_ms / 1000, settings.timeout_ms)
    limit = uploads.most_images(settings)
    parse = partial(uploads.parse, EmbeddingsRequest, body, limit)
    question = await uploads.aside(parse, len(body))
    uploads.check_count(len(question.images), limit)
    return question


def _check_dimensions(asked: int | None, model: ServedModel) -> None:
    there = model.backbone.dimensions
    if asked not in (None, there):
        raise ParameterError(
            f"embeddings of the model {model.name!r} have {there} dimensions and cannot be cut "
            f"short, got dimensions={asked}"
        )


def _item(index: int, answer: Answer, question: EmbeddingsRequest) -> EmbeddingItem:
    ran, output = Ran.of(answer), answer.output
    features = ran.model.backbone.embedding(output.features, output.logits)
    if question.normalize:
        features = F.normalize(features, dim=0)
    numbers = features.numpy()
    return EmbeddingItem(
        index=index,
        embedding=base64.b64encode(numbers.astype(np.dtype("<f4")).tobytes()).decode()
        if question.encoding_format == "base64"
        else numbers.tolist(),
        ladder=ran.model.ladder.name,
        rate=ran.rate,
        rates=list(ran.rates),
        reason=ran.reason,
        macs=ran.macs,
        macs_ratio=ran.macs_ratio,
        bank_digest=ran.bank_digest,
        cached=ran.cached,
    )
