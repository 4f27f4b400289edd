"""The process that serves: its socket, its server, and how signals end it.

The first SIGTERM or Ctrl-C makes the server not ready. It goes on serving for a while after
SIGTERM, so that load balancers can notice, then takes no more connections, answers what it has
taken and ends. The second one ends it at once.
"""

import math
import os
import signal
import socket
import time
from collections.abc import Callable
from contextlib import ExitStack
from types import FrameType

import uvicorn

from server.app import create_app
from server.observe import log
from server.settings import Settings
from server.web.serving import Serving
from tocom import ConfigError


def bind(host: str, port: int) -> socket.socket:
    """Return a socket at an address.

    Raises:
        ConfigError: if it cannot be had.
    """
    with ExitStack() as on_error:
        try:
            family, kind, protocol, _, address = socket.getaddrinfo(
                host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )[0]
            listener = on_error.enter_context(socket.socket(family, kind, protocol))
            # A port that a former server has just left may be taken at once.
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
        except OSError as error:
            raise ConfigError(f"cannot listen on {host}, port {port}: {error.strerror}") from error
        on_error.pop_all()
        return listener


def serve(settings: Settings, listener: socket.socket, greet: Callable[[Serving], None]) -> None:
    """Load the models and serve them until a signal asks for the end.

    Args:
        settings: the server's.
        listener: where to listen.
        greet: is called once the server serves.

    Raises:
        TocomError: if the models cannot be loaded.
    """
    log.configure(settings)
    app = create_app(settings)
    config = uvicorn.Config(
        app,
        access_log=False,  # our own log has a line for each request
        log_config=None,  # and formats what uvicorn says
        log_level=settings.log_level,
        # Requests end at their own deadline, before they would be cut off.
        timeout_graceful_shutdown=settings.timeout_ms // 1000 + 2,
    )
    _Server(config, app.state.serving, greet).run(sockets=[listener])


class _Server(uvicorn.Server):
    """Uvicorn that says when it serves and ends in steps."""

    def __init__(
        self, config: uvicorn.Config, serving: Serving, greet: Callable[[Serving], None]
    ) -> None:
        super().__init__(config)
        self._serving = serving
        self._greet = greet
        self._end = math.inf  # when to take no more connections

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if not self._serving.stopping.is_set():
            self._greet(self._serving)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._serving.stopping.is_set():
            # Not by the signal's default action: as the first process of a container it has none.
            os._exit(128 + sig)
        self._serving.stopping.set()
        delay = self._serving.settings.drain_delay_ms / 1000 if sig == signal.SIGTERM else 0
        self._end = time.monotonic() + delay

    async def on_tick(self, counter: int) -> bool:
        return await super().on_tick(counter) or time.monotonic() >= self._end
