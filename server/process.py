"""The process that serves: its server, and how signals end it.

While the models load, the first SIGTERM or Ctrl-C ends it at once. Later it makes the server not
ready. It goes on serving for a while after SIGTERM, so that load balancers can notice, then takes
no more connections, answers what it has taken and ends. The second one ends it at once.
"""

import gc
import math
import os
import signal
import socket
import time
from collections.abc import Callable
from functools import partial
from types import FrameType
from typing import TYPE_CHECKING

import uvicorn
from fastapi import FastAPI

from server.observe import log
from server.progress import Tell
from server.settings import Settings
from server.web.front import Front

if TYPE_CHECKING:  # torch is imported while the port is open already
    from server.web.serving import Serving


def serve(
    settings: Settings,
    listener: socket.socket,
    opened: Callable[[], None],
    ready: Callable[["Serving"], None],
) -> None:
    """Load the models and serve them until a signal asks for the end.

    The port is open all the time: until the models are ready, requests are told to come again.

    Args:
        settings: the server's.
        listener: where to listen.
        opened: is called once the port is open.
        ready: is called once the models are ready.

    Raises:
        TocomError: if the models cannot be loaded.
    """
    log.configure(settings)
    server = _Server(settings, opened, ready)
    server.run(sockets=[listener])
    if server.front.failure is not None:
        raise server.front.failure


def _load(settings: Settings, tell: Tell) -> FastAPI:
    import server.models.timm_without_dynamo  # noqa: F401  # isort: split
    from server.app import create_app

    return create_app(settings, tell)


class _Server(uvicorn.Server):
    """Uvicorn that answers from the first moment and ends in steps."""

    def __init__(
        self, settings: Settings, opened: Callable[[], None], ready: Callable[["Serving"], None]
    ) -> None:
        self.front = Front(
            partial(_load, settings), self._is_ready, self._has_failed, settings.cors_origins
        )
        config = uvicorn.Config(
            self.front,
            access_log=False,  # our own log has a line for each request
            log_config=None,  # and formats what uvicorn says
            log_level=settings.log_level,
            # Requests end at their own deadline, before they would be cut off.
            timeout_graceful_shutdown=settings.timeout_ms // 1000 + 2,
        )
        super().__init__(config)
        self._opened = opened
        self._ready = ready
        self._serving: Serving | None = None
        self._end = math.inf  # when to take no more connections

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._opened()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._serving is None or self._serving.stopping.is_set():
            # There is nothing to finish, or no more time for it. Not by the signal's default
            # action: as the first process of a container it has none.
            os._exit(128 + sig)
        self._serving.stopping.set()
        delay = self._serving.settings.drain_delay_ms / 1000 if sig == signal.SIGTERM else 0
        self._end = time.monotonic() + delay

    async def on_tick(self, counter: int) -> bool:
        return await super().on_tick(counter) or time.monotonic() >= self._end

    def _is_ready(self, app: FastAPI) -> None:
        # What is loaded by now stays. Looking through it for garbage, as Python would every few
        # hundred requests, stops all threads for a fifth of a second.
        gc.collect()
        gc.freeze()
        self._serving = app.state.serving
        self._ready(app.state.serving)

    def _has_failed(self) -> None:
        self.should_exit = True
