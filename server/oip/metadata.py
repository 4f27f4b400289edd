"""What the Open Inference Protocol tells of the server and its models, without running one."""

from importlib.metadata import version

from fastapi import APIRouter, Request

from server.errors import ForbiddenError
from server.oip import tensors
from server.oip.asked import MODEL, VERSIONED, AskedModel, StatisticsDep
from server.oip.schemas import (
    VERSION,
    ConfigParameter,
    ConfiguredTensor,
    DynamicBatching,
    ModelConfig,
    ModelMetadata,
    ModelReady,
    RepositoryEntry,
    RepositoryRequest,
    ServerLive,
    ServerMetadata,
    ServerReady,
    StatisticsList,
    TensorMetadata,
)
from server.oip.tensors import FREE
from server.oip.wire import parse
from server.web.body import SOON, in_time, read
from server.web.problems import described
from server.web.serving import ServingDep

EXTENSIONS = (
    "binary_tensor_data",
    "classification",
    "model_configuration",
    "model_repository",
    "parameters",
    "statistics",
)
PLATFORM = "pytorch_timm"
CONFIG_TYPES = {"BYTES": "TYPE_STRING", "FP32": "TYPE_FP32", "UINT8": "TYPE_UINT8"}

TAG = "Open Inference Protocol: metadata"

router = APIRouter(tags=[TAG])
repository = APIRouter(tags=[TAG])


@router.get("/v2/health/live", summary="Is the server alive?", responses=described(503))
async def live(serving: ServingDep) -> ServerLive:
    """Tell whether the server lives."""
    serving.check_alive()
    return ServerLive(live=True)


@router.get("/v2/health/ready", summary="Is the server ready?", responses=described(503))
async def ready(serving: ServingDep) -> ServerReady:
    """Tell whether requests should be sent here."""
    serving.check_ready()
    return ServerReady(ready=True)


@router.get("/v2", summary="Describe the server")
async def server_metadata() -> ServerMetadata:
    """Tell what the server is and which extensions of the protocol it has."""
    return ServerMetadata(
        name="tocom-serve", version=version("tocom-serve"), extensions=list(EXTENSIONS)
    )


@router.get("/v2/models/stats", summary="Statistics of all models")
async def all_statistics(serving: ServingDep, statistics: StatisticsDep) -> StatisticsList:
    """Tell what all models have done for requests of this protocol."""
    return StatisticsList(model_stats=[statistics.of(model.name) for model in serving.models.all()])


@router.get(MODEL, summary="Describe the tensors of a model", responses=described(404, 422))
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


@router.get(MODEL + "/ready", summary="Is a model ready?", responses=described(404, 422, 503))
@router.get(VERSIONED + "/ready", include_in_schema=False)
async def model_ready(model: AskedModel, serving: ServingDep) -> ModelReady:
    """Tell whether requests for a model should be sent here."""
    serving.check_ready()
    return ModelReady(name=model.name, ready=True)


@router.get(MODEL + "/config", summary="Configuration of a model", responses=described(404, 422))
@router.get(VERSIONED + "/config", include_in_schema=False)
async def model_config(model: AskedModel, serving: ServingDep) -> ModelConfig:
    """Tell how a model is served, as Triton would say it."""

    def configured(described: tensors.Tensors, optional: bool) -> list[ConfiguredTensor]:
        return [
            ConfiguredTensor(
                name=name, data_type=CONFIG_TYPES[datatype], dims=list(shape), optional=optional
            )
            for name, (datatype, shape) in described.items()
        ]

    settings = serving.settings
    told: dict[str, int | str] = {
        "max_rate": model.max_rate,
        "source_rate": model.source,
        "ladders": ",".join(each.ladder.name for each in model.ladders),
    }
    if (digest := model.repaired.bank_digest) is not None:
        told["bank_digest"] = digest
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


@router.get(MODEL + "/stats", summary="Statistics of a model", responses=described(404, 422))
@router.get(VERSIONED + "/stats", include_in_schema=False)
async def model_statistics(model: AskedModel, statistics: StatisticsDep) -> StatisticsList:
    """Tell what a model has done for requests of this protocol."""
    return StatisticsList(model_stats=[statistics.of(model.name)])


@repository.post("/v2/repository/index", summary="List all models", responses=described(401))
async def repository_index(serving: ServingDep) -> list[RepositoryEntry]:
    """List the models. All are loaded, so that asking for the ready ones changes nothing."""
    state = "READY" if serving.warm.is_set() else "LOADING"
    return [
        RepositoryEntry(name=model.name, version=VERSION, state=state, reason="")
        for model in serving.models.all()
    ]


@repository.post(
    "/v2/repository/models/{name}/load",
    summary="Load a model",
    responses=described(400, 401, 403, 404, 408, 413, 422),
)
async def load(request: Request, name: str, serving: ServingDep) -> None:
    """Confirm that a model is loaded: all models of the server always are."""
    serving.models.get(name)
    body = await in_time(read(request), SOON, round(1000 * SOON))
    if parse(RepositoryRequest, body or b"{}").parameters:
        raise ForbiddenError("models are served as the settings say: load takes no parameters")


@repository.post(
    "/v2/repository/models/{name}/unload",
    summary="Unload a model",
    responses=described(401, 403, 404, 422),
)
async def unload(name: str, serving: ServingDep) -> None:
    """Always refused: models are served as long as the server runs."""
    serving.models.get(name)
    raise ForbiddenError(f"the model {name!r} is served until the server ends; nothing unloads it")
