"""What a server tells of its models and of itself."""

from fastapi import APIRouter

from server.schemas import Health, ModelDetail, ModelList, Status
from server.v1 import answers
from server.web.problems import described
from server.web.serving import Shared

router = APIRouter()


@router.get("/v1/models")
async def models(serving: Shared) -> ModelList:
    """List the models, the default one first, with what each rate costs."""
    return ModelList(models=[answers.summary(model) for model in serving.models.all()])


@router.get("/v1/models/{name}", responses=described(404))
async def model(name: str, serving: Shared) -> ModelDetail:
    """Describe one model."""
    return answers.detail(serving.models.get(name))


@router.get("/v1/status")
async def status(serving: Shared) -> Status:
    """Tell what the server has to do just now."""
    return answers.status(serving)


@router.get("/healthz", responses=described(503))
async def healthz(serving: Shared) -> Health:
    """Tell whether the server lives: its event loop, which answers this, and its engine."""
    serving.check_alive()
    return Health(status="ok")


@router.get("/readyz", responses=described(503))
async def readyz(serving: Shared) -> Health:
    """Tell whether requests should be sent here: all is warm, and nobody has asked for the end."""
    serving.check_ready()
    return Health(status="ready")
