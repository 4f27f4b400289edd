"""What happens to every request before it is routed: its id and the limit of its body.

Plain ASGI: starlette's BaseHTTPMiddleware would hide a client's going from the routes.
"""

import re
import uuid
from collections.abc import Mapping

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.errors import TooLargeError

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
        request_id = asked if _ID.fullmatch(asked) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id

        async def send_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)[REQUEST_ID] = request_id
            await send(message)

        await self.app(scope, receive, send_id)


class BodyLimit:
    """Ends the reading of a body that is too large, before it is read where it says so itself."""

    def __init__(
        self, app: ASGIApp, max_bytes: int, by_path: Mapping[str, float] | None = None
    ) -> None:
        """Limit the bodies of all requests.

        Args:
            app: what answers them.
            max_bytes: that a body may have.
            by_path: that it may have instead, where it is sent to one of these paths.
        """
        self.app = app
        self.max_bytes = max_bytes
        self.by_path = by_path or {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the application with a `receive` that raises TooLargeError."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        length = Headers(scope=scope).get("Content-Length", "")
        # Cut, as int() refuses thousands of digits; what is no number is counted as it comes.
        declared = int(length[:20]) if length.isdecimal() else 0
        limit = self.by_path.get(scope["path"], self.max_bytes)
        read = 0

        async def receive_limited() -> Message:
            nonlocal read
            _check(declared, limit)
            message = await receive()
            read += len(message.get("body", b""))
            _check(read, limit)
            return message

        await self.app(scope, receive_limited, send)


def _check(size: int, limit: float) -> None:
    if size > limit:
        raise TooLargeError(f"the request body is larger than the {limit:,} bytes that are allowed")
