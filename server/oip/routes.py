"""The Open Inference Protocol, version 2, over HTTP: what Triton's and KServe's clients speak.

With the extensions for binary tensors, classification, parameters, statistics and the model's
configuration. Has one version of each model, and no sequences, shared memory or streams.
"""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request, Response
from torch import Tensor

from server.engine.job import Answer
from server.errors import (
    ForbiddenError,
    ImageError,
    UnknownModelError,
    UploadTimeoutError,
)
from server.inference.run import Deadline, answer_all, work_for
from server.models.served import ServedModel
from server.observe.log import INFERENCE, note
from server.oip import tensors
from server.oip.schemas import (
    VERSION,
    ConfigParameter,
    ConfiguredTensor,
    DynamicBatching,
    InferRequest,
    InferResponse,
    ModelConfig,
    ModelMetadata,
    ModelReady,
    RepositoryEntry,
    RepositoryRequest,
    RequestedOutput,
    ServerLive,
    ServerMetadata,
    ServerReady,
    StatisticsList,
    TensorMetadata,
)
from server.oip.statistics import Statistics
from server.oip.tensors import FREE, IMAGE
from server.oip.wire import HEADER, inflate, parse, read_request, write_response
from server.settings import Settings
from server.v1 import answers
from server.web.access import charge
from server.web.problems import described
from server.web.serving import Serving, Shared
from tocom import TocomError

EXTENSIONS = (
    "binary_tensor_data",
    "classification",
    "model_configuration",
    "model_repository",
    "parameters",
    "statistics",
)
PLATFORM = "pytorch_timm"
CONFIG_TYPES = {"BYTES": "TYPE_STRING", "FP32": "TYPE_FP32"}

MODEL = "/v2/models/{name}"
VERSIONED = MODEL + "/versions/{version}"

router = APIRouter(tags=["open inference protocol"])
inference = APIRouter(tags=["open inference protocol", INFERENCE])


def _asked_model(request: Request, name: str, serving: Shared) -> ServedModel:
    """Return the model that an address names, with or without its version."""
    model = serving.models.get(name)
    asked = request.path_params.get("version", VERSION)
    if asked != VERSION:
        raise UnknownModelError(
            f"the model {name!r} has no version {asked[:40]!r}, only {VERSION!r}"
        )
    return model


def _statistics(request: Request) -> Statistics:
    statistics = request.app.state.statistics
    assert isinstance(statistics, Statistics)
    return statistics


AskedModel = Annotated[ServedModel, Depends(_asked_model)]
Counted = Annotated[Statistics, Depends(_statistics)]


@router.get("/v2/health/live", responses=described(503))
async def live(serving: Shared) -> ServerLive:
    """Tell whether the server lives."""
    serving.check_alive()
    return ServerLive(live=True)


@router.get("/v2/health/ready", responses=described(503))
async def ready(serving: Shared) -> ServerReady:
    """Tell whether requests should be sent here."""
    serving.check_ready()
    return ServerReady(ready=True)


@router.get("/v2")
async def server_metadata() -> ServerMetadata:
    """Tell what the server is and which extensions of the protocol it has."""
    return ServerMetadata(
        name="tocom-serve", version=version("tocom-serve"), extensions=list(EXTENSIONS)
    )


@router.get("/v2/models/stats")
async def all_statistics(serving: Shared, statistics: Counted) -> StatisticsList:
    """Tell what all models have done for requests of this protocol."""
    return StatisticsList(model_stats=[statistics.of(model.name) for model in serving.models.all()])


@router.get(MODEL, responses=described(404))
@router.get(VERSIONED, include_in_schema=False)
async def model_metadata(model: AskedModel) -> ModelMetadata:
    """Tell what a model takes and gives."""

    def described_as(described: tensors.Tensors) -> list[TensorMetadata]:
        return [
            TensorMetadata(name=name, datatype=datatype, shape=[FREE, *shape])
            for name, (datatype, shape) in described.items()
        ]

    return ModelMetadata(
        name=model.name,
        versions=[VERSION],
        platform=PLATFORM,
        inputs=described_as(tensors.inputs(model)),
        outputs=described_as(tensors.outputs(model)),
    )


@router.get(MODEL + "/ready", responses=described(404, 503))
@router.get(VERSIONED + "/ready", include_in_schema=False)
async def model_ready(model: AskedModel, serving: Shared) -> ModelReady:
    """Tell whether requests for a model should be sent here."""
    serving.check_ready()
    return ModelReady(name=model.name, ready=True)


@router.get(MODEL + "/config", responses=described(404))
@router.get(VERSIONED + "/config", include_in_schema=False)
async def model_config(model: AskedModel, serving: Shared) -> ModelConfig:
    """Tell how a model is served, as Triton would say it."""

    def configured(described: tensors.Tensors, optional: bool) -> list[ConfiguredTensor]:
        return [
            ConfiguredTensor(
                name=name, data_type=CONFIG_TYPES[datatype], dims=list(shape), optional=optional
            )
            for name, (datatype, shape) in described.items()
        ]

    settings = serving.settings
    told: dict[str, int | str] = {"max_rate": model.max_rate, "source_rate": model.source}
    if model.bank is not None:
        told["bank_digest"] = model.bank.info.digest
    return ModelConfig(
        name=model.name,
        platform=PLATFORM,
        max_batch_size=tensors.max_images(settings),
        input=configured(tensors.inputs(model), optional=True),
        output=configured(tensors.outputs(model), optional=False),
        dynamic_batching=DynamicBatching(
            preferred_batch_size=[settings.max_batch],
            max_queue_delay_microseconds=round(1000 * settings.max_wait_ms),
        ),
        parameters={name: ConfigParameter(string_value=str(value)) for name, value in told.items()},
    )


@router.get(MODEL + "/stats", responses=described(404))
@router.get(VERSIONED + "/stats", include_in_schema=False)
async def model_statistics(model: AskedModel, statistics: Counted) -> StatisticsList:
    """Tell what a model has done for requests of this protocol."""
    return StatisticsList(model_stats=[statistics.of(model.name)])


@router.post("/v2/repository/index")
async def repository_index(serving: Shared) -> list[RepositoryEntry]:
    """List the models. All are loaded, so that asking for the ready ones changes nothing."""
    state = "READY" if serving.warm.is_set() else "LOADING"
    return [
        RepositoryEntry(name=model.name, version=VERSION, state=state, reason="")
        for model in serving.models.all()
    ]


@router.post("/v2/repository/models/{name}/load", responses=described(400, 403, 404, 413))
async def load(request: Request, name: str, serving: Shared) -> None:
    """Agree that a model be loaded that is."""
    serving.models.get(name)
    if parse(RepositoryRequest, await request.body() or b"{}").parameters:
        raise ForbiddenError("models are served as the settings say: load takes no parameters")


@router.post("/v2/repository/models/{name}/unload", responses=described(403, 404))
async def unload(name: str, serving: Shared) -> None:
    """Refuse: models are served as long as the server runs."""
    serving.models.get(name)
    raise ForbiddenError(f"the model {name!r} is served until the server ends; nothing unloads it")


def _inlined(schema: Any, definitions: Mapping[str, Any]) -> Any:
    """Return a schema without references; OpenAPI would look for their targets elsewhere."""
    if isinstance(schema, list):
        return [_inlined(each, definitions) for each in schema]
    if not isinstance(schema, dict):
        return schema
    if reference := schema.get("$ref"):
        schema = {**definitions[reference.rpartition("/")[2]], **schema}
    return {
        key: _inlined(value, definitions)
        for key, value in schema.items()
        if key not in ("$defs", "$ref")
    }


def _request_body() -> dict[str, Any]:
    schema = InferRequest.model_json_schema()
    return {
        "required": True,
        "content": {
            "application/json": {"schema": _inlined(schema, schema["$defs"])},
            "application/octet-stream": {"schema": {"type": "string", "format": "binary"}},
        },
    }


@inference.post(
    MODEL + "/infer",
    response_model=InferResponse,
    responses={
        200: {"content": {"application/octet-stream": {}}},
        **described(400, 401, 404, 408, 413, 415, 422, 429, 503, 504),
    },
    openapi_extra={"requestBody": _request_body()},
)
@inference.post(VERSIONED + "/infer", include_in_schema=False)
async def infer(
    request: Request, model: AskedModel, serving: Shared, statistics: Counted
) -> Response:
    """Run a model on images, at the rate that the parameters of the request ask for."""
    clock = serving.engine.clock
    arrived = clock()
    try:
        question, asked, found = await _run(request, model, serving, arrived)
        began = clock()
        response = _respond(model, question, asked, found)
    except Exception:
        statistics.failed(model.name, clock() - arrived)
        raise
    ended = clock()
    statistics.succeeded(model.name, found, ended - arrived, ended - began)
    note(request, **answers.notes(tensors.telling(found)))
    return response


async def _run(
    request: Request, model: ServedModel, serving: Serving, arrived: float
) -> tuple[InferRequest, Sequence[RequestedOutput], Sequence[Answer]]:
    """Read a request and run its images: all of them, or it fails."""
    settings, engine = serving.settings, serving.engine
    engine.check_room()  # before the body is read: what cannot be taken need not be sent
    sent = await _body(request, settings)
    # In a thread: large JSON takes its time, and others shall not wait for it.
    question, images = await asyncio.to_thread(_understand, request, sent, model, settings)
    query = question.parameters
    note(request, model=model.name, rate=query.rate)
    work = work_for(model, query, settings)
    asked = tensors.wanted(question, model)
    engine.check_room(len(images))
    charge(request, len(images) - 1)
    wanted_ms = query.deadline_ms
    if wanted_ms is not None:  # from the arrival on, of which the deadline does not know
        wanted_ms = max(1, wanted_ms - round(1000 * (engine.clock() - arrived)))
    deadline = Deadline(engine, wanted_ms, settings)
    outcomes = await answer_all(request, engine, work, images, deadline)
    return question, asked, [_whole(index, outcome) for index, outcome in enumerate(outcomes)]


async def _body(request: Request, settings: Settings) -> bytes:
    async def read() -> bytes:
        # Not request.body(): it would keep the bytes for as long as the request lives.
        return b"".join([chunk async for chunk in request.stream()])

    try:
        return await asyncio.wait_for(read(), settings.timeout_ms / 1000)
    except asyncio.TimeoutError:
        raise UploadTimeoutError(
            f"the request body did not arrive within {settings.timeout_ms} ms"
        ) from None


def _understand(
    request: Request, sent: bytes, model: ServedModel, settings: Settings
) -> tuple[InferRequest, list[Callable[[], Tensor]]]:
    """Return what a request asks for and what makes each of its images."""
    encoding = request.headers.get("Content-Encoding", "")
    body = inflate(sent, encoding, settings.max_body_bytes)
    question, inputs = read_request(body, request.headers.get(HEADER), raw_input=IMAGE)
    return question, tensors.preparations(inputs, model, settings)


def _whole(index: int, outcome: Answer | TocomError) -> Answer:
    """Return an answer, or raise why there is none, naming the image."""
    if isinstance(outcome, TocomError):
        outcome.args = (f"image {index}: {outcome}",)
        raise outcome
    if not outcome.output.logits.isfinite().all():
        raise ImageError(
            f"image {index}: what the model says of it is not finite; are its pixels normalised?"
        )
    return outcome


def _respond(
    model: ServedModel,
    question: InferRequest,
    asked: Sequence[RequestedOutput],
    found: Sequence[Answer],
) -> Response:
    response = InferResponse(
        model_name=model.name,
        id=question.id,
        parameters=tensors.parameters(found),
        outputs=[],
    )
    body, length = write_response(response, tensors.results(question, asked, found))
    if length is None:
        return Response(body, media_type="application/json")
    return Response(body, media_type="application/octet-stream", headers={HEADER: str(length)})
