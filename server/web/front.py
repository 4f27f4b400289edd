"""What answers from the first moment: itself while the models load, then the application.

Needs no torch: it is there before that is imported.
"""

import asyncio
import html
from collections.abc import Callable, Sequence
from dataclasses import asdict

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from server.errors import UnavailableError
from server.progress import Progress, Tell
from server.schemas import Health
from server.web.middleware import RequestId
from server.web.origins import allow_origins
from server.web.problems import MEDIA_TYPE, problem_of

#: Where a server that starts says that it lives, and what it says.
ALIVE = {
    "/healthz": Health(status="ok").model_dump(),
    "/livez": Health(status="ok").model_dump(),
    "/v2/health/live": {"live": True},
}
#: Seconds after which asking again makes sense.
RETRY_AFTER = 2

PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="refresh" content="{seconds}">
<title>ToCom Serve is starting</title>
<style>
:root {{ color-scheme: light dark; background: light-dark(#f1f2f2, #0f1214); }}
body {{ margin: 2rem; font: 1rem/1.5 system-ui, sans-serif; }}
progress {{ width: min(30rem, 100%); accent-color: light-dark(#b4005a, #ff78ae); }}
</style>
<h1>ToCom Serve is starting</h1>
<p>Now: {progress}.</p>
<progress aria-label="Rates that are warm" {share}></progress>
<p>This page looks again by itself.</p>
"""


class Front:
    """The application as its server sees it; see the module.

    Attributes:
        app: the application, once it answers by itself.
        failure: why it never will.
    """

    def __init__(
        self,
        load: Callable[[Tell], FastAPI],
        ready: Callable[[FastAPI], None],
        failed: Callable[[], None],
        origins: Sequence[str] = (),
    ) -> None:
        """Load nothing yet; that begins with the server.

        Args:
            load: makes the application, in a thread of its own.
            ready: is called once the application answers.
            failed: is called if it cannot be loaded or started.
            origins: the setting `cors_origins`.
        """
        self.app: FastAPI | None = None
        self.failure: Exception | None = None
        self._load = load
        self._ready = ready
        self._failed = failed
        self._progress = Progress()
        self._ended = asyncio.Event()
        self._meanwhile: ASGIApp = RequestId(allow_origins(self._answer, origins))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, or let the application do it."""
        if scope["type"] == "lifespan":
            await self._live(receive, send)
        else:
            await (self.app or self._meanwhile)(scope, receive, send)

    async def _live(self, receive: Receive, send: Send) -> None:
        await receive()  # the server starts
        running = asyncio.create_task(self._run())
        await send({"type": "lifespan.startup.complete"})
        await receive()  # it ends
        self._ended.set()
        await running
        await send({"type": "lifespan.shutdown.complete"})

    async def _run(self) -> None:
        try:
            app = await asyncio.to_thread(self._load, self._tell)
            async with app.router.lifespan_context(app):
                self.app = app
                self._ready(app)
                await self._ended.wait()
        except Exception as error:
            self.failure = error  # raised by whoever runs the server, once that has ended
            self._failed()

    def _tell(self, progress: Progress) -> None:
        self._progress = progress

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        if (alive := ALIVE.get(request.url.path)) is not None:
            await JSONResponse(alive)(scope, receive, send)
            return
        progress = self._progress
        response: Response
        headers = {"Retry-After": str(RETRY_AFTER)}
        if request.url.path == "/" and "text/html" in request.headers.get("Accept", ""):
            share = f'value="{progress.warm}" max="{progress.rates}"' if progress.rates else ""
            page = PAGE.format(
                seconds=RETRY_AFTER, progress=html.escape(str(progress)), share=share
            )
            response = HTMLResponse(page, UnavailableError.status, headers)
        else:
            error = UnavailableError(f"the server is starting: {progress}")
            body = {**problem_of(request, error).model_dump(), "progress": asdict(progress)}
            response = JSONResponse(body, error.status, headers, MEDIA_TYPE)
        await response(scope, receive, send)
