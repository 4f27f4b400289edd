"""The HTTP interface: what is asked, checked and answered. The engine does the work."""

import asyncio
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request
from fastapi.responses import RedirectResponse
from starlette.requests import ClientDisconnect
from torch import Tensor

from server import answers, images, uploads
from server.engine import Answer, Engine
from server.errors import (
    DeadlineError,
    ParameterError,
    UnavailableError,
    UnknownModelError,
    UploadTimeoutError,
)
from server.models import ServedModel
from server.problems import described
from server.schemas import Classification, ClassifyQuery, Health, ModelDetail, ModelList
from server.settings import Settings


@dataclass(frozen=True)
class Serving:
    """What the routes share: the settings, the models by name and the engine."""

    settings: Settings
    models: Mapping[str, ServedModel]
    engine: Engine

    def model(self, name: str | None) -> ServedModel:
        """Return a model by its name; the first for None.

        Raises:
            UnknownModelError: naming those that there are.
        """
        if name is None:
            return next(iter(self.models.values()))
        if name not in self.models:
            raise UnknownModelError(
                f"no model is called {name[:100]!r}; there are: {', '.join(self.models)}"
            )
        return self.models[name]

    def check_alive(self) -> None:
        """Raise UnavailableError if the engine gives no sign of life."""
        allowed = self.settings.stall_ms / 1000
        if self.engine.silence > allowed:
            raise UnavailableError(f"the engine has not answered for more than {allowed:g} s")


def get_serving(request: Request) -> Serving:
    """Return what the application of a request serves."""
    serving = request.app.state.serving
    assert isinstance(serving, Serving)
    return serving


Shared = Annotated[Serving, Depends(get_serving)]
router = APIRouter()


@router.post(
    "/v1/classify",
    # Logits that nobody asked for are left out; an absent bank is null.
    response_model_exclude_unset=True,
    responses=described(400, 404, 408, 413, 415, 422, 503, 504),
    openapi_extra={"requestBody": uploads.OPENAPI},
)
async def classify(
    request: Request, query: Annotated[ClassifyQuery, Query()], serving: Shared
) -> Classification:
    """Classify one image (JPEG, PNG or WebP) at the rate that the caller chooses.

    The image is the form field `file` or the whole body.
    """
    engine = serving.engine
    arrived = engine.clock()
    deadline = arrived + serving.settings.timeout_ms / 1000
    model = serving.model(query.model)
    work = model.at(model.parse_rate(query.rate), query.compensate)
    top_k = _top_k(query.top_k, model, serving.settings)
    engine.check_room()  # before the body is read: what cannot be taken need not be sent
    image = await _read(request, model, deadline - engine.clock(), serving.settings)
    future = engine.submit(work, image, deadline)
    del image  # the bytes of the upload go when they are decoded, not when the answer leaves
    answer = await _wait(request, future, deadline - engine.clock())
    total = engine.clock() - arrived
    return answers.classification(
        work, answer, top_k, query.logits, total, request.state.request_id
    )


@router.get("/v1/models")
async def models(serving: Shared) -> ModelList:
    """List the models, the default one first, with what each rate costs."""
    return ModelList(models=[answers.summary(model) for model in serving.models.values()])


@router.get("/v1/models/{name}", responses=described(404))
async def model(name: str, serving: Shared) -> ModelDetail:
    """Describe one model."""
    return answers.detail(serving.model(name))


@router.get("/healthz", responses=described(503))
async def healthz(serving: Shared) -> Health:
    """Tell whether the server lives: its event loop, which answers this, and its engine."""
    serving.check_alive()
    return Health(status="ok")


@router.get("/readyz", responses=described(503))
async def readyz(serving: Shared) -> Health:
    """Tell whether requests are taken: models are loaded and warm, nothing is shutting down."""
    serving.check_alive()
    if not serving.engine.running:
        raise UnavailableError("the engine is not running")
    return Health(status="ready")


@router.get("/", include_in_schema=False)
async def index() -> RedirectResponse:
    """Lead to the documentation."""
    return RedirectResponse("docs")


def _top_k(asked: int | None, model: ServedModel, settings: Settings) -> int:
    limit = min(settings.max_top_k, len(model.backbone.class_names))
    if asked is None:
        return min(settings.top_k, limit)
    if asked > limit:
        raise ParameterError(
            f"top_k must be in 1..{limit} for the model {model.name!r}, got {asked}"
        )
    return asked


async def _read(
    request: Request, model: ServedModel, timeout: float, settings: Settings
) -> "partial[Tensor]":
    """Read a request's image; what is returned decodes and prepares it, in some other thread."""
    try:
        data = await asyncio.wait_for(uploads.read_image(request), timeout)
    except asyncio.TimeoutError:
        raise UploadTimeoutError(
            f"the request body did not arrive within {settings.timeout_ms} ms"
        ) from None
    return partial(_prepare, data, model, settings.max_pixels)


def _prepare(data: bytes, model: ServedModel, max_pixels: int) -> Tensor:
    image: Tensor = model.transform(images.decode(data, max_pixels))
    return image


async def _wait(request: Request, future: Future[Answer], timeout: float) -> Answer:
    """Wait for an answer; give it up when its time is over or its client gone."""
    answer = asyncio.wrap_future(future)
    gone = asyncio.create_task(_until_gone(request))
    try:
        either: set[asyncio.Future[Any]] = {answer, gone}
        await asyncio.wait(either, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        if answer.done():
            return answer.result()
        if gone.done():
            raise ClientDisconnect
        raise DeadlineError("the deadline passed before the answer was there")
    finally:
        answer.cancel()  # also takes the image out of the engine's queue
        gone.cancel()


async def _until_gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
