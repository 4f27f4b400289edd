"""What the application holds for its routes, and how they get it."""

import threading
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Annotated, TypeVar

from fastapi import Depends, Request

from server.engine.engine import Engine
from server.errors import UnavailableError
from server.inference.cache import AnswerCache
from server.models.registry import Registry
from server.observe.metrics import Metrics
from server.settings import Settings
from server.web.middleware import Budget

T = TypeVar("T")


def held(name: str, kind: type[T]) -> Callable[[Request], Awaitable[T]]:
    """Return the dependency of a route on what its application's state holds under a name."""

    # A coroutine, though it never waits: FastAPI calls plain functions in a thread.
    async def get(request: Request) -> T:
        found = getattr(request.app.state, name)
        assert isinstance(found, kind)
        return found

    return get


@dataclass(frozen=True)
class Serving:
    """Settings, models, engine, metrics, bytes of uploads and kept answers of one server.

    Attributes:
        cache: None: no answers are kept.
        started: when, in the engine's time.
        stopping: set once a signal has asked for the end: not ready, and still serving.
        warm: set once every model has run, and the deltas of its rates are made.
    """

    settings: Settings
    models: Registry
    engine: Engine
    metrics: Metrics
    budget: Budget
    started: float
    cache: AnswerCache | None = None
    stopping: threading.Event = field(default_factory=threading.Event)
    warm: threading.Event = field(default_factory=threading.Event)

    @property
    def ready(self) -> bool:
        """Whether requests should be sent here."""
        alive = self.engine.silence <= self.settings.stall_ms / 1000
        return alive and self.engine.running and self.warm.is_set() and not self.stopping.is_set()

    def check_alive(self) -> None:
        """Raise UnavailableError if the engine gives no sign of life."""
        allowed = self.settings.stall_ms / 1000
        if self.engine.silence > allowed:
            raise UnavailableError(f"the engine has not answered for more than {allowed:g} s")

    def check_ready(self) -> None:
        """Raise UnavailableError if requests should go elsewhere."""
        self.check_alive()
        if not self.ready:
            reason = "shutting down" if self.stopping.is_set() else "not warm yet"
            raise UnavailableError(f"the server is {reason}")


ServingDep = Annotated[Serving, Depends(held("serving", Serving))]
