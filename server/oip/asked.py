"""Which model an address of the Open Inference Protocol asks for."""

from typing import Annotated

from fastapi import Depends, Request

from server.errors import UnknownModelError
from server.models.served import ServedModel
from server.oip.schemas import VERSION
from server.oip.statistics import Statistics
from server.web.serving import ServingDep, held

MODEL = "/v2/models/{name}"
VERSIONED = MODEL + "/versions/{version}"


async def asked_model(request: Request, name: str, serving: ServingDep) -> ServedModel:
    """Return the model that an address names, with or without its version."""
    model = serving.models.get(name)
    asked = request.path_params.get("version", VERSION)
    if asked != VERSION:
        raise UnknownModelError(
            f"the model {name!r} has no version {asked[:40]!r}, only {VERSION!r}"
        )
    return model


AskedModel = Annotated[ServedModel, Depends(asked_model)]
StatisticsDep = Annotated[Statistics, Depends(held("statistics", Statistics))]
