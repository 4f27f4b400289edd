"""The body of a request, received a little before it is asked for.

Only who receives hears that the client has gone. One that reads a body piece by piece, as it gets
room for it, would hear of it when there is no more use in knowing.
"""

import asyncio

from starlette.types import Message, Receive

#: Bytes beyond which reading waits until they are asked for.
AHEAD = 256 * 1024


class Ahead:
    """See the module: `watch` runs as a task beside who uses `receive`."""

    def __init__(self, receive: Receive) -> None:
        """Describe the body of a request that nobody else receives."""
        self._receive = receive
        self._changed = asyncio.Condition()
        self._body = bytearray()
        self._complete = False
        self._dropped = False
        self._failure: Exception | None = None

    async def watch(self) -> bool:
        """Receive until the client has gone; returns False if receiving fails before."""
        try:
            while (message := await self._receive())["type"] != "http.disconnect":
                async with self._changed:
                    if not self._dropped:
                        self._body += message.get("body", b"")
                    self._complete = not message.get("more_body", False)
                    self._changed.notify_all()
                    await self._changed.wait_for(lambda: len(self._body) <= AHEAD)
        except Exception as error:
            async with self._changed:
                self._failure = error
                self._changed.notify_all()
            return False
        return True

    async def receive(self) -> Message:
        """Return what has arrived of the body as soon as there is some; raise what failed."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._body or self._complete or self._failure)
            if self._failure and not self._body:
                raise self._failure
            body = bytes(self._body)
            self._body.clear()
            self._changed.notify_all()
        return {"type": "http.request", "body": body, "more_body": not self._complete}

    async def drop(self) -> None:
        """Drop the rest of the body, as it arrives."""
        async with self._changed:
            self._dropped = True
            self._body.clear()
            self._changed.notify_all()
