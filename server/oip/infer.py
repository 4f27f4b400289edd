"""The Open Inference Protocol, version 2, over HTTP: what Triton's and KServe's clients speak.

With the extensions for binary tensors, classification, parameters, statistics and the model's
configuration. Has one version of each model, and no sequences, shared memory or streams.
"""

import asyncio
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from fastapi import APIRouter, Request, Response
from torch import Tensor

from server.engine.job import Answer
from server.errors import ImageError
from server.inference.ran import Ran
from server.inference.run import Deadline, answer_all, noted, work_for
from server.models.segmenting import Scene, ServedSegmenter
from server.models.served import ServedModel
from server.observe.notes import PROTOCOL_INFERENCE, note
from server.oip import tensors
from server.oip.asked import MODEL, VERSIONED, AskedModel, StatisticsDep
from server.oip.schemas import InferRequest, InferResponse, RequestedOutput
from server.oip.wire import inflate, read_request, write_response
from server.settings import Settings
from server.web.access import charge, priority_of
from server.web.body import JSON, described_body, in_time, read
from server.web.origins import JSON_LENGTH
from server.web.problems import described
from server.web.serving import Serving, ServingDep
from tocom import TocomError

#: A pattern of the addresses below.
PATH = r"/v2/models/[^/]+(/versions/[^/]+)?/infer"

router = APIRouter(tags=[PROTOCOL_INFERENCE])


def _request_body() -> dict[str, Any]:
    return {
        "required": True,
        "content": {
            JSON: {"schema": described_body(InferRequest)},
            "application/octet-stream": {"schema": {"type": "string", "format": "binary"}},
        },
    }


@router.post(
    MODEL + "/infer",
    summary="Run a model",
    response_model=InferResponse,
    responses={
        200: {"content": {"application/octet-stream": {}}},
        **described(400, 401, 404, 408, 413, 415, 422, 429, 503, 504),
    },
    openapi_extra={"requestBody": _request_body()},
)
@router.post(VERSIONED + "/infer", include_in_schema=False)
async def infer(
    request: Request, model: AskedModel, serving: ServingDep, statistics: StatisticsDep
) -> Response:
    """Run a model on images, at the rate that the parameters of the request ask for."""
    clock = serving.engine.clock
    arrived = clock()
    try:
        sent, body = await _read(request, serving)
        with serving.budget.holding(0 if body is sent else len(body)):
            question, asked, scenes, found = await _run(request, model, serving, body, arrived)
            began = clock()
            respond = partial(_respond, model, question, asked, scenes, found, serving.settings)
            # In a thread where there may be millions of pixels: others shall not wait for them.
            of_pixels = isinstance(model, ServedSegmenter)
            response = await asyncio.to_thread(respond) if of_pixels else respond()
    except Exception:
        statistics.failed(model.name, clock() - arrived)
        raise
    ended = clock()
    statistics.succeeded(model.name, found, ended - arrived, ended - began)
    note(request, **Ran.of(tensors.telling(found)).notes)
    return response


async def _read(request: Request, serving: Serving) -> tuple[bytes | bytearray, bytes | bytearray]:
    """Return the body of a request as it was sent, and as it is meant."""
    settings = serving.settings
    # Before the body is read: what cannot be taken need not be sent.
    serving.engine.check_room(priority=priority_of(request))
    sent = await in_time(read(request), settings.timeout_ms / 1000, settings.timeout_ms)
    encoding = request.headers.get("Content-Encoding")
    if encoding is None:  # as most are: no thread is needed
        return sent, sent
    return sent, await asyncio.to_thread(inflate, sent, encoding, settings.max_body_bytes)


async def _run(
    request: Request,
    model: ServedModel,
    serving: Serving,
    body: bytes | bytearray,
    arrived: float,
) -> tuple[InferRequest, Sequence[RequestedOutput], Sequence[Scene], Sequence[Answer]]:
    """Run the images of a request: all of them, or it fails."""
    settings, engine = serving.settings, serving.engine
    # In a thread: large JSON takes its time, and others shall not wait for it.
    question, images = await asyncio.to_thread(_understand, request, body, model, settings)
    query = question.parameters
    work = work_for(model, query, settings)
    note(request, **noted(work))  # once it is known to be one
    asked = tensors.wanted(question, model)
    charge(request, len(images) - 1)
    deadline = Deadline(engine, query.deadline_ms, settings, arrived)
    scenes = [each for each in images if isinstance(each, Scene)]
    outcomes = await answer_all(request, engine, work, images, deadline, priority_of(request))
    found = [_whole(index, outcome) for index, outcome in enumerate(outcomes)]
    return question, asked, scenes, found


def _understand(
    request: Request, body: bytes | bytearray, model: ServedModel, settings: Settings
) -> tuple[InferRequest, list[Callable[[], Tensor]]]:
    """Return what a request asks for and what makes each of its images."""
    question, inputs = read_request(body, request.headers.get(JSON_LENGTH), raw_input=tensors.IMAGE)
    return question, tensors.preparations(inputs, model, settings)


def _whole(index: int, outcome: Answer | Exception) -> Answer:
    """Return an answer, or raise why there is none; a TocomError names the image."""
    if isinstance(outcome, Exception):
        if isinstance(outcome, TocomError):
            outcome.args = (f"image {index}: {outcome}",)
        raise outcome
    scores = getattr(outcome.output, "logits", outcome.output)
    if not scores.isfinite().all():
        raise ImageError(
            f"image {index}: what the model says of it is not finite; are its pixels normalised?"
        )
    return outcome


def _respond(
    model: ServedModel,
    question: InferRequest,
    asked: Sequence[RequestedOutput],
    scenes: Sequence[Scene],
    found: Sequence[Answer],
    settings: Settings,
) -> Response:
    outputs = tensors.results(question, asked, scenes, found, settings)
    response = InferResponse(
        model_name=model.name,
        id=question.id,
        parameters=tensors.parameters(found),
        outputs=[],
    )
    body, length = write_response(response, outputs)
    if length is None:
        return Response(body, media_type="application/json")
    return Response(body, media_type="application/octet-stream", headers={JSON_LENGTH: str(length)})
