"""The HTTP interface of banks, for who has the admin key."""

import asyncio
import math
from typing import Annotated

from fastapi import APIRouter, Depends, Request, Response, status
from pydantic import BaseModel, ConfigDict, Field, JsonValue
from starlette.datastructures import UploadFile

from adapters import BackboneInfo
from adapters.bank import MAX_INFO_BYTES, tensor_shapes
from server.banks.catalogue import Banks, Change, Known, Origin
from server.errors import BadRequestError, StoreFaultError, TooLargeError, UnsupportedTypeError
from server.web.access import require_admin
from server.web.body import FORM, JSON, content_type, read_json
from server.web.problems import described
from server.web.serving import held
from tocom import TOME

PATH = "/v1/banks"

_SHOWN = {"name", "digest", "method", "max_rate", "rank", "targets", "backbone"}
_HOW = f"curl -F info=@bank.json -F plugins=@plugins.safetensors .../{PATH[1:]}"
_FILE = {"type": "string", "format": "binary"}
_UPLOAD = {
    "type": "object",
    "required": ["info", "plugins"],
    "properties": {
        "info": _FILE | {"description": "bank.json"},
        "plugins": _FILE | {"description": "plugins.safetensors"},
    },
}


class BankEntry(BaseModel):
    """A bank that models can be served with."""

    name: str
    digest: str = Field(description="SHA-256 of its content")
    origin: Origin = Field(description="who keeps it; only the store's can be deleted")
    ladder: str = Field(description="what it is for: the ladder that its rates are of")
    method: str = Field(description="of the ladder")
    max_rate: int
    rank: int = Field(description="width of one step's low-rank pair")
    targets: list[str]
    backbone: BackboneInfo = Field(description="what it was distilled on")
    parameters: int
    models: list[str] = Field(description="names of those that are served with it")


class BankDetail(BankEntry):
    """A bank, with all that is known of it."""

    scale: float = Field(description="multiplier of its deltas")
    training: dict[str, JsonValue]
    evaluation: dict[str, JsonValue]


class BankList(BaseModel):
    """All banks, by name and digest."""

    banks: list[BankEntry]


class BankChoice(BaseModel):
    """Which bank to serve a model with."""

    model_config = ConfigDict(extra="forbid")

    bank: str = Field(
        description="8 or more digits of a digest, NAME or NAME@DIGEST", examples=["my-bank"]
    )


class BankChange(BaseModel):
    """What became of a model's bank."""

    model: str
    old_digest: str | None = Field(description="null: there was no bank")
    new_digest: str | None = Field(description="null: there is none")
    max_rate: int = Field(description="highest rate that the model runs at from now on")
    warning: str | None = Field(description="what speaks against the bank on the model")


BanksDep = Annotated[Banks, Depends(held("banks", Banks))]
router = APIRouter(dependencies=[Depends(require_admin)], tags=["Banks"])


@router.get(PATH, responses=described(401, 403))
def list_banks(banks: BanksDep) -> BankList:
    """List the banks that models can be served with."""
    return BankList(banks=[BankEntry(**_entry(bank, banks)) for bank in banks.all()])


@router.post(
    PATH,
    status_code=status.HTTP_201_CREATED,
    responses={
        200: {"description": "It was there already", "model": BankDetail},
        **described(400, 401, 403, 413, 415, 422, 507),
    },
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {"multipart/form-data": {"schema": _UPLOAD}},
        }
    },
)
async def upload_bank(request: Request, response: Response, banks: BanksDep) -> BankDetail:
    """Publish a bank: its two files, as the form fields `info` and `plugins`.

    It is seen once it is found to be whole, and is what its name stands for from then on.
    """
    try:
        info, plugins = await _read_form(request)
    except OSError as error:  # large parts are kept in files
        raise StoreFaultError(f"the upload cannot be kept: {error.strerror}") from error
    bank, new = await asyncio.to_thread(banks.add, info, plugins)
    if not new:
        response.status_code = status.HTTP_200_OK
    response.headers["Location"] = f"{PATH}/{bank.info.digest}"
    return _detail(bank, banks)


@router.get(PATH + "/{bank}", responses=described(401, 403, 404, 422))
def describe_bank(bank: str, banks: BanksDep) -> BankDetail:
    """Describe one bank, by eight or more digits of its digest, NAME or NAME@DIGEST."""
    return _detail(banks.find(bank), banks)


@router.delete(
    PATH + "/{bank}",
    status_code=status.HTTP_204_NO_CONTENT,
    responses=described(401, 403, 404, 409, 422, 507),
)
def delete_bank(bank: str, banks: BanksDep) -> None:
    """Remove a bank from the store, if no model is served with it."""
    banks.delete(bank)


@router.put(
    "/v1/models/{name}/bank",
    responses=described(400, 401, 403, 404, 408, 413, 415, 422),
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {JSON: {"schema": BankChoice.model_json_schema()}},
        }
    },
)
async def attach_bank(request: Request, name: str, banks: BanksDep) -> BankChange:
    """Serve a model with a bank from now on; until it is ready the old one serves."""
    choice = await read_json(request, BankChoice)
    return _change(await asyncio.to_thread(banks.attach, name, choice.bank))


@router.delete("/v1/models/{name}/bank", responses=described(401, 403, 404, 422))
def detach_bank(name: str, banks: BanksDep) -> BankChange:
    """Serve a model without a bank from now on."""
    return _change(banks.detach(name))


async def _read_form(request: Request) -> tuple[bytes, bytes]:
    """Return the two files of an uploaded bank; read here so that the key is asked for first."""
    if content_type(request) != FORM:
        raise UnsupportedTypeError(f"a bank is sent as multipart/form-data: {_HOW}")
    async with request.form(max_files=2, max_fields=2) as form:
        files = {name: part for name, part in form.items() if isinstance(part, UploadFile)}
        if len(form.multi_items()) != 2 or files.keys() != {"info", "plugins"}:
            came = ", ".join(name[:100] for name, _ in form.multi_items()) or "nothing"
            raise BadRequestError(f"a bank is the two files info and plugins, got {came}: {_HOW}")
        if (files["info"].size or 0) > MAX_INFO_BYTES:
            raise TooLargeError(
                f"bank.json is larger than the {MAX_INFO_BYTES:,} bytes that are allowed"
            )
        return await files["info"].read(), await files["plugins"].read()


def _entry(bank: Known, banks: Banks) -> dict[str, object]:
    shapes = tensor_shapes(bank.info).values()
    return bank.info.model_dump(include=_SHOWN) | {
        "origin": bank.origin,
        "ladder": bank.info.ladder.name if bank.info.ladder else TOME.name,
        "parameters": sum(math.prod(shape) for shape in shapes),
        "models": banks.users(bank.info.digest),
    }


def _detail(bank: Known, banks: Banks) -> BankDetail:
    notes = bank.info.model_dump(include={"scale", "training", "evaluation"})
    return BankDetail.model_validate(_entry(bank, banks) | notes)


def _change(change: Change) -> BankChange:
    model, bank = change.model, change.model.repaired.bank
    warnings = []
    if bank is not None and not bank.distilled_on(model.backbone):
        warnings.append(
            f"bank {bank.info.name!r} was distilled on other weights than {model.name!r} has and "
            "says it was tuned from: of use only if it was tuned from them all the same"
        )
    if bank is not None and (overridden := bank.overrides(model.backbone)) is not None:
        warnings.append(overridden)
    return BankChange(
        model=model.name,
        old_digest=change.old,
        new_digest=bank.info.digest if bank else None,
        max_rate=model.max_rate,
        warning="; ".join(warnings) or None,
    )
