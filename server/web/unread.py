"""Answers that their clients do not read: they are given up, so that they do not stay for ever.

Plain ASGI, like what happens to requests.
"""

import asyncio

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.observe.notes import notes_of

#: Bytes of a body that are sent at a time; with more than that unread, servers let a send wait.
PIECE = 2**16


class Unread:
    """Gives up answers whose clients make no room for them, and with each its connection.

    A server takes a message of any size and keeps it; only before the next one it waits for the
    client. So a body is sent in pieces and its end by itself: an answer is over once there is room
    for another one.
    """

    def __init__(self, app: ASGIApp, seconds: float) -> None:
        """Limit the patience with all clients.

        Args:
            app: what answers them.
            seconds: that a client may take to make room for a piece.
        """
        self.app = app
        self.seconds = seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the application with a `send` that ends it if the client takes too long."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        patient = _Patient(send, self.seconds)

        async def send_in_time(message: Message) -> None:
            # Of a stream it is a piece already.
            if message["type"] == "http.response.body" and not message.get("more_body", False):
                body = message.get("body", b"")
                for start in range(0, len(body), PIECE):
                    # No copy of a small body: all of some bytes are these bytes themselves.
                    piece = body[start : start + PIECE]
                    await patient.send({**message, "body": piece, "more_body": True})
                message = {**message, "body": b""}
            await patient.send(message)

        try:
            await self.app(scope, receive, send_in_time)
        except _UnreadError:
            # An answer without its end: the server closes the connection.
            notes_of(scope)["error"] = "Answer not read"
        finally:
            patient.end()


class _UnreadError(Exception):
    """An answer for which its client makes no room."""


class _Patient:
    """Sends the messages of an answer as long as none of them waits too long.

    One timer looks after all. They mostly need not wait, and a timer for each, such as anyio's
    fail_after(), would take several times as long as the rest of this.
    """

    def __init__(self, send: Send, seconds: float) -> None:
        self._send = send
        self._seconds = seconds
        self._loop = asyncio.get_running_loop()
        self._sender: asyncio.Task[object] | None = None
        self._since = 0.0
        self._is_over = False
        self._timer = self._loop.call_later(seconds, self._look)

    async def send(self, message: Message) -> None:
        """Send a message; raise _UnreadError if that takes too long."""
        self._since, self._sender = self._loop.time(), asyncio.current_task()
        try:
            await self._send(message)
        except asyncio.CancelledError:
            if self._is_over:
                raise _UnreadError from None
            raise
        finally:
            self._sender = None

    def end(self) -> None:
        """Look no longer."""
        self._timer.cancel()

    def _look(self) -> None:
        waited = self._loop.time() - self._since if self._sender else 0
        if self._sender and waited >= self._seconds:
            self._is_over = True
            self._sender.cancel()
        else:
            self._timer = self._loop.call_later(self._seconds - waited, self._look)
