"""The body of a request: what kind it is, its bytes, and how long it may take to arrive."""

from collections.abc import Awaitable, Mapping
from typing import Any, TypeVar

from anyio import fail_after
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ValidationError
from starlette.requests import Request

from server.errors import BadRequestError, UnsupportedTypeError, UploadTimeoutError

FORM = "multipart/form-data"
JSON = "application/json"

#: Seconds that a body of a few parameters may take.
SOON = 10.0

T = TypeVar("T")
Schema = TypeVar("Schema", bound=BaseModel)


def content_type(request: Request) -> str:
    """Return what a request says its body is, without parameters; empty if it says nothing.

    Raises:
        UnsupportedTypeError: if it is compressed.
    """
    check_plain(request)
    return request.headers.get("Content-Type", "").partition(";")[0].strip().lower()


def check_plain(request: Request) -> None:
    """Raise UnsupportedTypeError if a request says that its body is compressed."""
    encoding = request.headers.get("Content-Encoding", "identity").strip()
    if encoding.lower() not in ("", "identity"):
        raise UnsupportedTypeError(
            f"a body is read here as it is, not {encoding[:40]}; send it without Content-Encoding"
        )


def check_json(fault: Mapping[str, Any]) -> None:
    """Raise BadRequestError if the fault that pydantic finds with a body is that it is no JSON."""
    if fault["type"] == "json_invalid":
        raise BadRequestError(f"the body is not JSON: {fault['msg']}") from None


async def read(request: Request) -> bytearray:
    """Return the whole body."""
    # Not request.body(): it would keep the bytes for as long as the request lives, and join them
    # at once, for which the event loop would stand still.
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
    return body


async def read_json(request: Request, kind: type[Schema]) -> Schema:
    """Return a small body of JSON: unlike a parameter of a route it is read after keys are checked.

    Raises:
        UnsupportedTypeError: if it is compressed.
        UploadTimeoutError: if it does not arrive soon.
        BadRequestError: if it is not JSON.
        RequestValidationError: if it is something else, as if it were a parameter.
    """
    check_plain(request)
    body = await in_time(read(request), SOON, round(1000 * SOON))
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        check_json(error.errors()[0])
        faults = [fault | {"loc": ("body", *fault["loc"])} for fault in error.errors()]
        raise RequestValidationError(faults) from None


async def in_time(reading: Awaitable[T], seconds: float, allowed_ms: int) -> T:
    """Return what is read of a body, if it arrives in time.

    Args:
        reading: what reads it.
        seconds: that are left.
        allowed_ms: that it had from the start, for the message.

    Raises:
        UploadTimeoutError: if it does not.
    """
    try:
        with fail_after(seconds):
            return await reading
    except TimeoutError:
        raise UploadTimeoutError(
            f"the request body did not arrive within {allowed_ms} ms"
        ) from None


def described_body(kind: type[BaseModel]) -> dict[str, Any]:
    """Return the schema of a body, for the OpenAPI entry of a route that reads it itself."""
    schema = kind.model_json_schema()
    return dict(_inlined(schema, schema.get("$defs", {})))


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
