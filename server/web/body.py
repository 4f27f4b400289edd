"""The body of a request: what kind it is, its bytes, and how long it may take to arrive."""

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

from starlette.requests import Request

from server.errors import UploadTimeoutError

FORM = "multipart/form-data"
JSON = "application/json"

T = TypeVar("T")


def content_type(request: Request) -> str:
    """Return what a request says its body is, without parameters; empty if it says nothing."""
    return request.headers.get("Content-Type", "").partition(";")[0].strip().lower()


async def read(request: Request) -> bytes:
    """Return the whole body."""
    # Not request.body(): it would keep the bytes for as long as the request lives.
    return b"".join([chunk async for chunk in request.stream()])


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
        return await asyncio.wait_for(reading, seconds)
    except asyncio.TimeoutError:
        raise UploadTimeoutError(
            f"the request body did not arrive within {allowed_ms} ms"
        ) from None
