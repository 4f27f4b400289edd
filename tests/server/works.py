"""Work for engines and schedulers that needs no model, and what tests of engines share."""

import math
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from server.engine.engine import Engine
from server.engine.job import Answer
from server.engine.rates import Controller
from server.engine.times import ServiceTimes
from server.engine.turns import NORMAL
from server.engine.work import Work


def controller(max_batch: int = 8, highest: int = 16, slo: float = math.inf) -> Controller:
    """A controller of a model whose rates save what they save a DeiT: half at the highest."""
    return Controller(ServiceTimes(lambda rate: 2 * highest - rate), max_batch, slo)


@dataclass(frozen=True)
class Exact:
    """Work at an exact rate that calls a function."""

    function: Callable[[Tensor], Sequence[Any]] | None = field(compare=False, default=None)
    name: str = "work"
    rate: int = 0
    controller: Controller = field(compare=False, default_factory=controller)

    @property
    def low(self) -> int:
        return self.rate

    @property
    def high(self) -> int:
        return self.rate

    def at(self, rate: int) -> "Exact":
        return self

    def __call__(self, images: Tensor) -> Sequence[Any]:
        assert self.function is not None
        return self.function(images)


@dataclass(frozen=True)
class Open:
    """Work whose rate is left to the server."""

    low: int = 0
    high: int = 16
    name: str = "work"
    controller: Controller = field(compare=False, default_factory=controller)
    function: Callable[[Tensor], Sequence[Any]] | None = field(compare=False, default=None)
    rate: None = None

    def at(self, rate: int) -> Exact:
        return Exact(self.function, self.name, rate, self.controller)


#: Seconds that a machine busy with other things may take; nothing here waits that long.
PATIENCE = 60


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Double(Exact):
    """Twice the image; notes what ran and refuses batches with a negative image."""

    def __init__(self, name: str, ran: list[tuple[str, list[float]]] | None = None) -> None:
        super().__init__(self._double, name)
        object.__setattr__(self, "ran", [] if ran is None else ran)

    def _double(self, images: Tensor) -> Tensor:
        values = images[:, 0, 0, 0].tolist()
        self.ran.append((self.name, values))
        if min(values) < 0:
            raise RuntimeError(f"cannot run {min(values):g}")
        return 2 * images.flatten(1)[:, :1]


def image(value: float) -> Callable[[], Tensor]:
    return lambda: torch.full((3, 1, 1), float(value))


def submit_one(
    engine: Engine,
    work: Work,
    prepare: Callable[[], Tensor],
    deadline: float,
    due: float | None = None,
    priority: int = NORMAL,
) -> Future[Answer]:
    return engine.submit_all(work, [prepare], deadline, due, priority)[0]


def submit(engine: Engine, work: Double, value: float, deadline: float = math.inf) -> Future:
    return submit_one(engine, work, image(value), deadline)


def settle(engine: Engine) -> None:
    """Wait until all that was submitted has been prepared: one thread does it in order."""

    def fail() -> Tensor:
        raise LookupError

    future = submit_one(engine, Double("none"), fail, math.inf)
    assert isinstance(future.exception(timeout=PATIENCE), LookupError)


def value(future: Future[Answer]) -> float:
    return float(future.result(timeout=PATIENCE).output)
