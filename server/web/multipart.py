"""Reading the files of a multipart form one by one, while the rest of it is still arriving.

Starlette reads a form as a whole, so that a stream of files would end in memory or on disk.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass
from io import BytesIO

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import Field, FormParser, parse_options_header
from python_multipart.multipart import File as ParsedFile
from starlette.requests import Request

from server.errors import BadRequestError, TooLargeError

#: Bytes after which the event loop gets a turn.
UNBROKEN = 2**21
#: Name of the form field that holds an image; it may be repeated.
FIELD = "file"


@dataclass(frozen=True)
class File:
    """A file of a form; its name is the client's and may be anything."""

    name: str | None
    data: bytes


async def read_files(request: Request, max_bytes: int) -> AsyncIterator[File]:
    """Yield the files of a form's field `file`, each as soon as it has arrived.

    Args:
        request: its body is a form.
        max_bytes: that a file may have.

    Raises:
        BadRequestError: if the form is malformed, cut off or has something else in it.
        TooLargeError: if a file is too large; it was not read to its end then.
    """
    _, options = parse_options_header(request.headers["Content-Type"])
    if b"boundary" not in options:
        raise BadRequestError("the form's Content-Type names no boundary between its parts")
    arrived: deque[File] = deque()
    ended = False

    def on_file(file: ParsedFile) -> None:
        _check_name(file.field_name)
        _check_size(file.size, max_bytes)
        name = (file.file_name or b"").decode(errors="replace")
        assert isinstance(file.file_object, BytesIO)  # as MAX_MEMORY_FILE_SIZE says
        # Unlike what read() returns it is no copy.
        arrived.append(File(name or None, file.file_object.getvalue()))

    def on_field(field: Field) -> None:
        _check_name(field.field_name)
        raise BadRequestError(
            f"the form field {FIELD!r} holds text instead of a file: curl needs an @ before the "
            f"file's name, -F {FIELD}=@photo.jpg"
        )

    def on_end() -> None:
        nonlocal ended
        ended = True

    unfinished = 0  # bytes since the last file was complete
    try:
        parser = FormParser(
            "multipart/form-data",
            on_field,
            on_file,
            on_end,
            options[b"boundary"],
            config={"MAX_MEMORY_FILE_SIZE": float("inf")},
        )
        unbroken = 0
        async for chunk in request.stream():
            # What has arrived already is read without a pause: others get their turns.
            unbroken += len(chunk)
            if unbroken >= UNBROKEN:
                unbroken = 0
                await asyncio.sleep(0)
            parser.write(chunk)
            unfinished = 0 if arrived else unfinished + len(chunk)
            _check_size(unfinished, max_bytes)
            while arrived:
                yield arrived.popleft()
    except FormParserError as error:
        raise BadRequestError(f"the form cannot be read: {error}") from error
    if not ended:
        raise BadRequestError("the form ends before its closing boundary")


def _check_name(name: bytes | None) -> None:
    if name != FIELD.encode():
        shown = (name or b"").decode(errors="replace")[:100]
        raise BadRequestError(
            f"the form has a field {shown!r}, only {FIELD!r} is read; parameters go into the "
            "address: /v1/classify?rate=2"
        )


def _check_size(size: int, max_bytes: int) -> None:
    if size > max_bytes:
        raise TooLargeError(
            f"a file of the form is larger than the {max_bytes:,} bytes that are allowed"
        )
