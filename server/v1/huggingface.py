"""`/models/NAME`: image classification as Hugging Face's inference API has it.

`InferenceClient(model="http://HOST/models/NAME").image_classification(...)` asks for it. A rate
goes into the address or among the parameters.
"""

from collections.abc import Callable
from functools import partial
from typing import Annotated, Any, Literal

import torch
from fastapi import APIRouter, Query, Request, Response
from pydantic import BaseModel, BeforeValidator, Field
from torch import Tensor

from server.engine.job import Answer
from server.errors import UnsupportedTypeError
from server.inference.query import Entry, JsonRateQuery
from server.inference.ran import Ran
from server.inference.run import Deadline, model_of, top_k
from server.observe.notes import INFERENCE
from server.settings import Settings
from server.v1 import uploads
from server.v1.running import asked_for, run, whole
from server.web.access import priority_of
from server.web.body import FORM, JSON, content_type, described_body, in_time, read
from server.web.fetching import URL, FetcherDep
from server.web.origins import BANK_DIGEST, CACHED, RATE, REASON
from server.web.problems import described
from server.web.serving import ServingDep

#: The address below, and a pattern of it.
MODEL, PATH = "/models/{name}", r"/models/[^/]+"

#: What curl says of a file that it is given no type of, as in Hugging Face's own examples.
URLENCODED = "application/x-www-form-urlencoded"

#: What makes scores of logits.
TRANSFORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": partial(torch.softmax, dim=-1),
    "sigmoid": torch.sigmoid,
    "none": torch.Tensor.float,
}


class Parameters(JsonRateQuery):
    """The parameters of Hugging Face's API, and what is asked for of an image here."""

    top_k: int | None = Field(default=None, ge=1, description="number of predictions")
    function_to_apply: Literal["softmax", "sigmoid", "none"] | None = Field(
        default=None,
        description="what makes scores of logits; default: softmax, sigmoid if classes are not "
        "exclusive",
    )


def _base64_or_address(text: Any) -> Any:
    """Return the file that base64 holds; an address is left as it is."""
    return text if isinstance(text, str) and URL.match(text) else uploads.from_base64(text)


class ClassificationRequest(Entry):
    """An image in JSON."""

    inputs: Annotated[
        bytes | str, BeforeValidator(_base64_or_address, json_schema_input_type=str)
    ] = Field(description="an image in base64, a data: URI, or a URL that this server may fetch")
    parameters: Parameters = Field(default_factory=Parameters)


class LabelScore(BaseModel):
    """One class and its score."""

    label: str
    score: float


router = APIRouter(tags=[INFERENCE])


@router.post(
    MODEL,
    summary="Classify an image, as Hugging Face's clients ask for it",
    responses=described(400, 401, 403, 404, 408, 413, 415, 422, 429, 503, 504),
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {
                kind: content
                for kind, content in uploads.OPENAPI["content"].items()
                if kind != FORM
            }
            | {JSON: {"schema": described_body(ClassificationRequest)}},
        }
    },
)
async def classify_as_hugging_face(
    request: Request,
    response: Response,
    name: str,
    query: Annotated[Parameters, Query()],
    serving: ServingDep,
    fetcher: FetcherDep,
) -> list[LabelScore]:
    """Return the most likely classes of an image: all of the body, or base64 in its JSON.

    Parameters go into the address or into the JSON, which wins. The headers X-Rate, X-Reason,
    X-Bank-Digest and X-Cached of the answer say what ran.
    """
    settings = serving.settings
    arrived = serving.engine.clock()
    model = model_of("classification", name, serving.models)
    # Before the body is read: what cannot be taken need not be sent.
    serving.engine.check_room(priority=priority_of(request))
    reading = _read(request, query, settings)
    image, asked = await in_time(reading, settings.timeout_ms / 1000, settings.timeout_ms)
    predictions = top_k(asked.top_k, model, settings)
    work = asked_for(request, serving, model, asked)
    deadline = Deadline(serving.engine, asked.deadline_ms, settings, arrived)
    async with fetcher.files([image], deadline.left) as images:
        (answer,) = whole(await run(request, serving, work, images, deadline), "image")
    ran = Ran.of(answer)
    response.headers.update({RATE: str(ran.rate), REASON: ran.reason})
    if ran.cached:
        response.headers[CACHED] = "true"
    if ran.bank_digest is not None:
        response.headers[BANK_DIGEST] = ran.bank_digest
    usual = "sigmoid" if model.backbone.multi_label else "softmax"
    return _scores(answer, asked.function_to_apply or usual, predictions)


async def _read(
    request: Request, query: Parameters, settings: Settings
) -> tuple[bytes | str, Parameters]:
    """Return the image of a request, or its address, and all of its parameters."""
    kind = content_type(request)
    if kind == FORM:
        raise UnsupportedTypeError(f"a form is not read here, only an image or {JSON}")
    if kind == URLENCODED:
        return bytes(await read(request)), query
    if kind != JSON:
        (image,) = (await uploads.read_images(request, settings)).images
        return bytes(image), query
    body = await read(request)
    parse = partial(uploads.parse, ClassificationRequest, body, 1)
    question = await uploads.aside(parse, len(body))
    given = query.model_dump(exclude_unset=True)
    asked = Parameters.model_validate(given | question.parameters.model_dump(exclude_unset=True))
    return question.inputs, asked


def _scores(answer: Answer, function: str, predictions: int) -> list[LabelScore]:
    logits = answer.output.logits
    classes = logits.topk(predictions).indices
    scores = TRANSFORMS[function](logits)[classes]
    names = Ran.of(answer).model.backbone.class_names
    return [
        LabelScore(label=names[index], score=score)
        for index, score in zip(classes.tolist(), scores.tolist(), strict=True)
    ]
