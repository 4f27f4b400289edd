"""What a server tells of its models."""

from fastapi import APIRouter

from server.schemas import ModelDetail, ModelList
from server.v1 import answers
from server.web.problems import described
from server.web.serving import ServingDep

router = APIRouter(tags=["Models and state"])


@router.get("/v1/models", summary="List models")
async def list_models(serving: ServingDep) -> ModelList:
    """List the models, the default one first, with what each rate costs."""
    return ModelList(models=[answers.summary(model) for model in serving.models.all()])


@router.get("/v1/models/{name}", summary="Describe a model", responses=described(404, 422))
async def describe_model(name: str, serving: ServingDep) -> ModelDetail:
    """Describe one model."""
    return answers.detail(serving.models.get(name))
