"""The body of a request, received before it is asked for.

Only who receives hears that the client has gone, and after all that it sent before: even a server
that knows it tells when it is asked to receive. One that reads a body piece by piece, as it gets
room for it, would hear of it when there is no more use in knowing. Of a client that has sent more
than may be received ahead it is heard once the next piece has been used; no server tells it sooner.
"""

import asyncio
from collections import deque
from collections.abc import Callable

from starlette.types import Message, Receive

#: Bytes that may be received ahead in any case, and about as many as are passed on at a time.
AHEAD = 256 * 1024


class Ahead:
    """See the module: `watch` runs as a task beside who uses `receive`.

    Not for several threads: the event loop owns it.
    """

    def __init__(self, receive: Receive) -> None:
        """Describe the body of a request that nobody else receives."""
        self._receive = receive
        self._changed = asyncio.Event()
        self._limit = AHEAD
        # Not joined: a long buffer would be copied again and again as it grows.
        self._pieces: deque[bytearray] = deque()
        self._size = 0
        self._complete = False
        self._dropped = False
        self._failure: Exception | None = None

    def allow(self, size: int) -> None:
        """Receive ahead until there are more than so many bytes; never fewer than AHEAD."""
        self._limit = max(AHEAD, size)
        self._changed.set()

    async def watch(self) -> bool:
        """Receive until the client has gone; returns False if receiving fails before."""
        try:
            while (message := await self._receive())["type"] != "http.disconnect":
                self._keep(message)
                await self._until(lambda: self._size <= self._limit)
        except Exception as error:
            self._failure = error
            self._changed.set()
            return False
        return True

    async def receive(self) -> Message:
        """Return a piece of the body as soon as some has arrived; raise what failed."""
        await self._until(lambda: self._pieces or self._complete or self._failure)
        if self._failure and not self._pieces:
            raise self._failure
        piece = self._pieces.popleft() if self._pieces else bytearray()
        self._size -= len(piece)
        self._changed.set()
        more = bool(self._pieces) or not self._complete
        return {"type": "http.request", "body": bytes(piece), "more_body": more}

    def drop(self) -> None:
        """Drop the rest of the body, as it arrives."""
        self._dropped = True
        self._pieces.clear()
        self._size = 0
        self._changed.set()

    def _keep(self, message: Message) -> None:
        body = message.get("body", b"")
        self._complete = not message.get("more_body", False)
        if body and not self._dropped:
            # Joined up to a piece: a body that comes byte by byte would take a lot of memory.
            if self._pieces and len(self._pieces[-1]) + len(body) <= AHEAD:
                self._pieces[-1] += body
            else:
                self._pieces.append(bytearray(body))
            self._size += len(body)
        self._changed.set()

    async def _until(self, condition: Callable[[], object]) -> None:
        while not condition():
            self._changed.clear()
            await self._changed.wait()
