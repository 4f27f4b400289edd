"""Reading the images out of a request: form fields, the body itself or JSON of base64.

All of them are in memory then, so how many bytes and images a request may have is limited.
Requests with more than that are read by `batches`.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    FailFast,
    Field,
    ValidationError,
    model_validator,
)
from starlette.requests import Request

from adapters.schema import first_fault
from server.errors import BadRequestError, ParameterError, TooLargeError, UnsupportedTypeError
from server.settings import Settings
from server.web import encoded, multipart
from server.web.body import FORM, JSON, check_json, content_type, read

T = TypeVar("T")
Schema = TypeVar("Schema", bound=BaseModel)

_HOW = (
    f"send the image as the form field {multipart.FIELD!r} (curl -F {multipart.FIELD}=@photo.jpg), "
    "which may be repeated, as the body (image/jpeg, image/png, image/webp or "
    f'application/octet-stream) or as base64 in JSON ({JSON}): {{"images": ["..."]}}'
)


#: Commas that JSON may have for each image that is allowed: an image needs two, its name may hold
#: others. What is far beyond that is refused before it is parsed.
COMMAS = 64

#: Bytes from which parsing is worth a thread.
LARGE = 2**16


def from_base64(text: Any) -> Any:
    """Return what base64, or a data: URL of it, holds; what is no text is left as it is.

    Raises:
        ValueError: if it is something else.
    """
    if not isinstance(text, str):
        return text
    start = 0
    if text.startswith("data:"):
        start = text.find(";base64,") + len(";base64,")
        if start < len(";base64,"):
            raise ValueError("a data: URL of an image must hold ;base64, and what follows from it")
    try:
        return encoded.decode(text, start, broken=True)
    except ValueError as error:
        raise ValueError(f"this is not base64: {error}") from error


class EncodedImage(BaseModel):
    """An image in JSON."""

    model_config = ConfigDict(extra="forbid")

    b64: Annotated[bytes, BeforeValidator(from_base64, json_schema_input_type=str)] = Field(
        description="a JPEG, PNG or WebP file in base64, or a data: URL of it"
    )
    # Results of a stream wait, with their names, for a client that does not read them.
    name: str | None = Field(default=None, max_length=4096, description="to tell it from others")


class EncodedImages(BaseModel):
    """Several images in JSON: base64 by itself, or with a name."""

    model_config = ConfigDict(extra="forbid")

    images: Annotated[list[EncodedImage], FailFast()] = Field(min_length=1)

    @model_validator(mode="before")
    @classmethod
    def _name_base64(cls, body: Any) -> Any:
        if isinstance(body, dict) and isinstance(images := body.get("images"), list):
            wrapped = [{"b64": each} if isinstance(each, str) else each for each in images]
            return {**body, "images": wrapped}
        return body


_BINARY = {"type": "string", "format": "binary"}
_BASE64 = {"type": "string", "contentEncoding": "base64"}

#: A form with images in OpenAPI's words; routes that read their body themselves must say so.
FORM_SCHEMA = {
    "type": "object",
    "required": [multipart.FIELD],
    "properties": {multipart.FIELD: {"type": "array", "items": _BINARY, "minItems": 1}},
}

#: A request body with images in OpenAPI's words.
OPENAPI: dict[str, Any] = {
    "required": True,
    "content": {
        FORM: {"schema": FORM_SCHEMA},
        **{
            kind: {"schema": _BINARY}
            for kind in ("image/jpeg", "image/png", "image/webp", "application/octet-stream")
        },
        JSON: {
            "schema": {
                "type": "object",
                "required": ["images"],
                "additionalProperties": False,
                "properties": {
                    "images": {
                        "type": "array",
                        "minItems": 1,
                        "items": {"anyOf": [_BASE64, EncodedImage.model_json_schema()]},
                    }
                },
            }
        },
    },
}


@dataclass(frozen=True)
class Upload:
    """The images of a request, in their order.

    Attributes:
        images: the bytes of each; whoever takes them out of the list frees them early.
        single: whether it was sent as one image, to be answered by itself.
    """

    images: list[bytes] | list[bytearray]
    single: bool


async def read_images(request: Request, settings: Settings) -> Upload:
    """Return the images that a request holds, not yet decoded.

    Raises:
        BadRequestError: if there is none, or the body cannot be parsed.
        TooLargeError: if there are too many.
        UnsupportedTypeError: if the body is something else by its Content-Type.
        ParameterError: if JSON holds something else, or what is not base64.
    """
    if request.headers.get("Content-Length") == "0":
        raise BadRequestError(f"the request body is empty: {_HOW}")
    limit = most_images(settings)
    kind = content_type(request)
    if kind == FORM:
        upload = await _read_form(request, settings.max_body_bytes, limit)
    elif kind == JSON:
        body = await read(request)
        upload = await aside(partial(_parse, body, limit), len(body))
    elif kind in ("", "application/octet-stream") or kind.startswith("image/"):
        upload = Upload([await read(request)], single=True)
    else:
        raise UnsupportedTypeError(f"a body of type {kind[:100]} is not read here: {_HOW}")
    if upload.single and not upload.images[0]:
        raise BadRequestError(f"the image is empty: {_HOW}")
    return upload


def most_images(settings: Settings) -> int:
    """Return how many images a request may have that is answered as a whole."""
    # More than there are places in the queue could not be taken even if it is empty.
    return min(settings.max_images, settings.max_queue)


async def _read_form(request: Request, max_bytes: int, limit: int) -> Upload:
    images = []
    async for file in multipart.read_files(request, max_bytes):
        images.append(file.data)
        # Here, before the next one is read.
        check_count(len(images), limit)
    if not images:
        raise BadRequestError(f"the form has no field {multipart.FIELD!r}: {_HOW}")
    return Upload(images, single=len(images) == 1)


def _parse(body: bytes | bytearray, limit: int) -> Upload:
    images = parse(EncodedImages, body, limit).images
    check_count(len(images), limit)
    return Upload([image.b64 for image in images], single=False)


def parse(kind: type[Schema], body: bytes | bytearray, limit: int) -> Schema:
    """Return what the JSON of a body with images says.

    Args:
        kind: what it should be.
        body: its bytes.
        limit: images that it may hold.

    Raises:
        BadRequestError: if it is not JSON.
        TooLargeError: if it lists far more than so many images.
        ParameterError: if it is something else, or holds what is not base64.
    """
    if body.count(b",") > COMMAS * limit:
        raise TooLargeError(
            f"the body lists far more than the {limit} images that are answered together"
        )
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        (fault, *_) = error.errors(include_url=False, include_input=False)
        check_json(fault)
        of = "'s" if fault["loc"] else ":"
        form = ""
        if kind is EncodedImages and len(fault["loc"]) < 2:
            form = '; it is {"images": ["BASE64", ...]}'
        raise ParameterError(f"the body{of} {first_fault(error)}{form}") from None


async def aside(parse: Callable[[], T], size: int) -> T:
    """Return what `parse` returns, which works on so many bytes: of many in a thread."""
    return await asyncio.to_thread(parse) if size > LARGE else parse()


def check_count(images: int, limit: int) -> None:
    """Raise TooLargeError if a request has more images than are answered together."""
    if images > limit:
        raise TooLargeError(
            f"the request has {images} or more images; at most {limit} are answered together, "
            "any number by /v1/classify/batch"
        )
