"""Many images in one request, answered line by line as they are done."""

import math
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from fastapi.responses import StreamingResponse
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from server.engine.job import Answer
from server.inference.query import ClassifyQuery
from server.inference.run import model_of, noted, top_k, work_for
from server.observe.notes import INFERENCE, note
from server.schemas import BatchLine
from server.v1 import answers, uploads
from server.v1.stream import LINES, Outcome, Stream
from server.web.body import FORM
from server.web.problems import described, problem_of
from server.web.serving import ServingDep

PATH = "/v1/classify/batch"

router = APIRouter(tags=[INFERENCE])


class _Lines(StreamingResponse):
    """Lines of JSON, made while the request is read: who makes them sees the client go."""

    media_type = LINES[0]
    body_iterator: Any  # an async generator, which aclosing() asks for

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # Without the base's own watch, which would take the rest of the request for itself.
        async with aclosing(self.body_iterator):
            await self.stream_response(send)


@router.post(
    PATH,
    summary="Classify a stream of images",
    response_class=_Lines,
    responses={
        200: {"model": BatchLine, "description": "A line for each image"},
        **described(400, 401, 404, 408, 413, 415, 422, 429, 503, 504),
    },
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {
                FORM: {"schema": uploads.FORM_SCHEMA},
                LINES[0]: {"schema": uploads.EncodedImage.model_json_schema()},
            },
        }
    },
)
async def classify_batch(
    request: Request, query: Annotated[ClassifyQuery, Query()], serving: ServingDep
) -> _Lines:
    """Classify any number of images; answers are lines of JSON, in the order they are done.

    Images are form fields `file`, or lines of JSON with `b64` and, if you like, `name`. Each may
    be as large as a body otherwise may. An image that fails gets a line with its error and the
    others go on. Unless there is a `deadline_ms`, for all of them, what others ask for comes first.
    """
    model = model_of("classification", query.model, serving.models)
    predictions = top_k(query.top_k, model, serving.settings)
    work = work_for(model, query, serving.settings, trace=query.merge_map)
    clock = serving.engine.clock
    deadline = math.inf if query.deadline_ms is None else clock() + query.deadline_ms / 1000
    stream = Stream(request, serving, model, work, deadline)
    note(request, **noted(work))

    def describe(outcome: Outcome) -> bytes:
        line = BatchLine(
            index=outcome.index, name=outcome.name, done=stream.done, total=stream.total
        )
        if isinstance(outcome.answer, Answer):
            spent, request_id = clock() - outcome.arrived, request.state.request_id
            line.result = answers.classification(
                outcome.answer, query, predictions, spent, request_id
            )
        else:
            line.error = problem_of(request, outcome.answer)
        return _encode(line)

    async def body() -> AsyncIterator[bytes]:
        async with aclosing(stream.run()) as outcomes:
            first = await anext(outcomes, None)
            yield b""  # begun, so that whoever closes this closes the outcomes, too
            try:
                if first:
                    yield describe(first)
                async for outcome in outcomes:
                    yield describe(outcome)
            except ClientDisconnect:
                pass  # there is nobody to tell
            except Exception as error:  # the answer has begun: only its last line can tell
                last = BatchLine(index=None, name=None, done=stream.done, total=stream.total)
                last.error = problem_of(request, error)
                yield _encode(last)
            finally:
                note(request, images=stream.done)

    lines = body()
    # Before there is a first line, what is wrong with the request can still be its status.
    await anext(lines)
    return _Lines(lines)


def _encode(line: BatchLine) -> bytes:
    return line.model_dump_json(exclude_unset=True).encode() + b"\n"
