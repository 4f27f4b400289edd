"""A stream of images and its answer, message by message as bare ASGI."""

import asyncio
import json

from server.v1.batch import PATH


class Conversation:
    """A request whose body and answer go on at the same time."""

    def __init__(self, app, query: bytes = b"", headers=()):
        self.to_read: asyncio.Queue = asyncio.Queue()
        self.listening = asyncio.Event()
        self.listening.set()
        self._sent: asyncio.Queue = asyncio.Queue()
        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": "POST",
            "path": PATH,
            "raw_path": PATH.encode(),
            "root_path": "",
            "scheme": "http",
            "query_string": query,
            "headers": [(b"content-type", b"application/x-ndjson"), *headers],
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 80),
        }
        self.task = asyncio.create_task(app(scope, self.to_read.get, self._send))

    async def _send(self, message) -> None:
        await self.listening.wait()
        self._sent.put_nowait(message)

    def say(self, body: bytes, more_body: bool = True) -> None:
        message = {"type": "http.request", "body": body, "more_body": more_body}
        self.to_read.put_nowait(message)

    def go(self) -> None:
        self.to_read.put_nowait({"type": "http.disconnect"})

    async def hear(self) -> dict | None:
        """Return the next line; None at the end."""
        message = await asyncio.wait_for(self._sent.get(), 60)
        if message["type"] == "http.response.start":
            self.status = message["status"]
            message = await asyncio.wait_for(self._sent.get(), 60)
        return json.loads(message["body"]) if message["body"] else None


def converse(app, conversation):
    """Run an application and a conversation with it on one event loop."""

    async def run():
        async with app.router.lifespan_context(app):
            await asyncio.wait_for(conversation(app), 60)

    asyncio.run(run())


async def settle() -> None:
    """Let an application do all that it can do without other threads."""
    for _ in range(100):
        await asyncio.sleep(0)
