"""The class of every pixel, over HTTP."""

import asyncio
import json
from collections.abc import AsyncGenerator
from contextlib import aclosing
from io import BytesIO
from typing import Annotated

import numpy as np
from fastapi import APIRouter, Query, Request, Response
from PIL import Image
from starlette.requests import ClientDisconnect

from server.engine.job import Answer
from server.errors import DeadlineError, ParameterError
from server.inference.query import SegmentQuery
from server.inference.ran import Ran
from server.inference.run import Deadline, answer_all, model_of, until_gone
from server.models.segmenting import Scene, ServedSegmenter
from server.observe.notes import INFERENCE, note
from server.schemas import ImageAnswer, Segmentation, Segmentations
from server.v1 import answers, uploads
from server.v1.running import asked_for
from server.web.access import charge, priority_of
from server.web.body import in_time
from server.web.origins import ANSWER
from server.web.problems import described, problem_of
from server.web.serving import ServingDep

PATH = "/v1/segment"
PNG = "image/png"

router = APIRouter(tags=[INFERENCE])


@router.post(
    PATH,
    summary="Segment images",
    response_model=Segmentation | Segmentations,
    responses={
        200: {"content": {PNG: {"schema": {"type": "string", "format": "binary"}}}},
        **described(400, 401, 404, 408, 413, 415, 422, 429, 503, 504),
    },
    openapi_extra={"requestBody": uploads.OPENAPI},
)
async def segment(
    request: Request, query: Annotated[SegmentQuery, Query()], serving: ServingDep
) -> Response:
    """Return the class of every pixel, at the rate that the caller chooses, or `auto`.

    Images are sent as those to classify are. The answer to one is a PNG with a palette, or JSON;
    several are answered together, as JSON.
    """
    model = model_of("segmentation", query.model, serving.models)
    assert isinstance(model, ServedSegmenter)
    settings, engine = serving.settings, serving.engine
    deadline = Deadline(engine, query.deadline_ms, settings)
    work = asked_for(request, serving, model, query)
    # Before the body is read: what cannot be taken need not be sent.
    engine.check_room(priority=priority_of(request))
    reading = uploads.read_images(request, settings)
    upload = await in_time(reading, deadline.left, deadline.wanted_ms)
    if query.format == "png" and not upload.single:
        raise ParameterError(
            "format=png is for one image that is sent by itself, as a form field or as the body; "
            "several are answered as JSON"
        )
    png = query.format == "png"
    if query.format is None and upload.single:
        png = PNG in request.headers.get("Accept", "")
    charge(request, len(upload.images) - 1)
    scenes = [Scene(data, model, settings) for data in upload.images]
    upload.images.clear()  # the bytes of an image are free once it is decoded
    outcomes = await answer_all(request, engine, work, [*scenes], deadline, priority_of(request))
    first = outcomes[0]
    if isinstance(first, Answer):
        note(request, **Ran.of(first).notes)
    told = []
    async with aclosing(_wanted(request, deadline, scenes, outcomes)) as wanted:
        async for scene, outcome in wanted:
            if not isinstance(outcome, Answer):
                if upload.single:
                    raise outcome
                told.append(problem_of(request, outcome).model_dump_json().encode())
                continue
            seconds, request_id = deadline.spent, request.state.request_id
            # In threads: there may be millions of pixels, and others shall not wait for them.
            ran, classes = await asyncio.to_thread(
                answers.segmentation, outcome, scene, query, seconds, request_id
            )
            if png:
                headers = {ANSWER: json.dumps(ran.model_dump())}
                content = await asyncio.to_thread(_png, classes, model)
                return Response(content, media_type=PNG, headers=headers)
            told.append(await asyncio.to_thread(_json, ran, classes, model))
    content = told[0] if upload.single else b'{"results":[' + b",".join(told) + b"]}"
    return Response(content, media_type="application/json")


async def _wanted(
    request: Request, deadline: Deadline, scenes: list[Scene], outcomes: list[Answer | Exception]
) -> AsyncGenerator[tuple[Scene, Answer | Exception], None]:
    """Yield pictures and their outcomes, as long as somebody waits for what is made of them.

    Classes of many large pictures take long, and the room that decoding needs. So the answer to a
    picture whose turn comes after the deadline is a DeadlineError.

    Raises:
        ClientDisconnect: if the client has gone.
    """
    gone = asyncio.create_task(until_gone(request))
    try:
        for scene, outcome in zip(scenes, outcomes, strict=True):
            if gone.done():
                raise ClientDisconnect
            if isinstance(outcome, Answer) and deadline.left <= 0:
                yield scene, DeadlineError("the deadline passed before the answer was there")
            else:
                yield scene, outcome
    finally:
        gone.cancel()


def _json(ran: ImageAnswer, classes: np.ndarray, model: ServedSegmenter) -> bytes:
    return answers.runs(ran, classes, model.class_names).model_dump_json().encode()


def _png(classes: np.ndarray, model: ServedSegmenter) -> bytes:
    """Return classes [H, W] as an image whose palette has their colours."""
    image, file = Image.fromarray(classes), BytesIO()
    image.putpalette([channel for colour in model.palette for channel in colour])
    image.save(file, "PNG")
    return file.getvalue()
