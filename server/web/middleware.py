"""What happens to every request before it is routed: its id and the limit of its body.

Plain ASGI: starlette's BaseHTTPMiddleware would hide a client's going from the routes.
"""

import math
import random
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.errors import BadRequestError, TooLargeError, UnavailableError

REQUEST_ID = "X-Request-Id"

_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


class RequestId:
    """Takes over a request's X-Request-Id, or makes one, and sends it back."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the application with `request.state.request_id` set."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        asked = Headers(scope=scope).get(REQUEST_ID, "")
        # What is not plain is not echoed: it would end in logs and in others' headers.
        request_id = asked if _ID.fullmatch(asked) else _made_id()
        scope.setdefault("state", {})["request_id"] = request_id

        async def send_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)[REQUEST_ID] = request_id
            await send(message)

        await self.app(scope, receive, send_id)


def _made_id() -> str:
    # Not by uuid4(): it asks the system for its bits, and whoever does waits for Python's lock
    # afterwards, beside a forward longer than all else on the way of a request.
    return f"{random.getrandbits(128):032x}"


class Budget:
    """Bytes of uploads that the server holds at a time.

    Not for several threads: the event loop owns it.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.held = 0
        self._streamed = 0

    def take(self, size: int) -> None:
        """Hold so many bytes more.

        Raises:
            UnavailableError: if there is no room for them.
        """
        if self.held + size > self.limit:
            raise UnavailableError(
                f"requests that are being read or worked on hold {self.held:,} of the "
                f"{self.limit:,} bytes that they may have together"
            )
        self.held += size

    def release(self, size: int) -> None:
        """Hold so many bytes less."""
        self.held -= size

    @contextmanager
    def holding(self, size: int) -> Iterator[None]:
        """Hold so many bytes more until the end of the block.

        Raises:
            UnavailableError: if there is no room for them.
        """
        self.take(size)
        try:
            yield
        finally:
            self.release(size)

    @contextmanager
    def streaming(self, size: int) -> Iterator[None]:
        """Hold the bytes of a stream until its end.

        Streams may last for ever. What several hold is half at most, so that others find room.

        Raises:
            UnavailableError: if there is no room for them.
        """
        allowed = self.limit // 2
        if self._streamed and self._streamed + size > allowed:
            raise UnavailableError(
                f"streams of images hold {self._streamed:,} of the {allowed:,} bytes that they "
                "may have together"
            )
        with self.holding(size):
            self._streamed += size
            try:
                yield
            finally:
                self._streamed -= size


class BodyLimit:
    """Ends the reading of a body that is too large, before it is read where it says so itself."""

    def __init__(
        self, app: ASGIApp, budget: Budget, max_bytes: int, by_path: Mapping[str, float]
    ) -> None:
        """Limit the bodies of all requests.

        Args:
            app: what answers them.
            budget: holds the bytes of a body until its request ends; those of an endless one are
                not counted here.
            max_bytes: that a body may have.
            by_path: that it may have instead, where a pattern matches the whole path.
        """
        self.app = app
        self.budget = budget
        self.max_bytes = max_bytes
        self.by_path = {re.compile(pattern): limit for pattern, limit in by_path.items()}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the application with a `receive` that raises TooLargeError or UnavailableError."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        length = headers.get("Content-Length", "")
        # Cut, as int() refuses thousands of digits; what is no number is counted as it comes.
        declared = int(length[:20]) if length.isdecimal() else 0
        # A proxy, or an application that this one is mounted in, may have put a prefix before it.
        limit = self._limit(scope["path"].removeprefix(scope.get("root_path", "")))
        read = 0

        async def receive_limited() -> Message:
            nonlocal read
            if length and "Transfer-Encoding" in headers:
                # Proxies differ in which of them they believe, which hides requests in bodies.
                raise BadRequestError("a request has Content-Length or Transfer-Encoding, not both")
            _check(declared, limit)
            message = await receive()
            size = len(message.get("body", b""))
            _check(read + size, limit)
            if limit < math.inf:
                self.budget.take(size)
                read += size
            return message

        try:
            await self.app(scope, receive_limited, send)
        finally:
            self.budget.release(read)

    def _limit(self, path: str) -> float:
        for pattern, limit in self.by_path.items():
            if pattern.fullmatch(path):
                return limit
        return self.max_bytes


def _check(size: int, limit: float) -> None:
    if size > limit:
        raise TooLargeError(f"the request body is larger than the {limit:,} bytes that are allowed")
