"""Load for a server on this machine: closed loops, which give capacity, and open ones, latency.

A client of its own on asyncio's streams: on a machine of few cores what the client takes is
taken from the server, and a full HTTP client takes several times as much. It speaks as much of
HTTP/1.1 as the servers that are measured need. Answers are kept as bytes, to be read afterwards.
"""

import asyncio
import gc
import itertools
import json
import os
import random
import re
import selectors
from collections.abc import Coroutine, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import numpy as np

T = TypeVar("T")

#: Seconds until an answer is given up; more than any server here allows itself.
TIMEOUT = 60.0
#: Seconds after which an idle connection is not used again: servers close theirs after five.
IDLE = 2.0
#: Seconds that 99 of 100 requests of an open loop may be late, or its latencies are void.
LATE = 0.002

_BOUNDARY = "an-image-of-a-benchmark"
_LENGTH = re.compile(rb"\r\ncontent-length: (\d+)", re.IGNORECASE)


class Request(NamedTuple):
    """A request as it goes over the wire."""

    head: bytes
    body: bytes


@dataclass(frozen=True)
class Exchange:
    """A request and its answer; times are seconds since the load began.

    Attributes:
        planned: when it was to be sent.
        sent: when it was.
        done: when the answer was there, or it was clear that there is none.
        status: of the answer; 0: there is none.
        body: of the answer; why there is none.
    """

    planned: float
    sent: float
    done: float
    status: int
    body: bytes

    def json(self) -> Any:
        """Return what the answer holds."""
        return json.loads(self.body)


@dataclass(frozen=True)
class Step:
    """Load of so many requests a second, on average, for some seconds."""

    seconds: float
    rate: float


def poisson_plan(steps: Sequence[Step], seed: int) -> list[float]:
    """Return when requests are to be sent: a Poisson process, seconds from the beginning."""
    chance = random.Random(seed)
    plan: list[float] = []
    start = 0.0
    for step in steps:
        # What came before makes no difference to a Poisson process: each step starts anew.
        now = start
        while (now := now + chance.expovariate(step.rate)) < start + step.seconds:
            plan.append(now)
        start += step.seconds
    return plan


def gamma_plan(seconds: float, rate: float, variation: float, seed: int) -> list[float]:
    """Return when requests are to be sent that come in bursts: gaps are drawn from a gamma.

    Args:
        seconds: from the beginning to the end.
        rate: requests a second in the mean, exactly: gaps are scaled so that all fit.
        variation: standard deviation of the gaps over their mean; 1 would be a Poisson process.
        seed: of the gaps.
    """
    count = round(seconds * rate)
    gaps = np.random.default_rng(seed).gamma(variation**-2, size=count + 1)
    times: list[float] = (seconds * gaps.cumsum() / gaps.sum())[:-1].tolist()
    return times


def form(image: bytes) -> bytes:
    """Return an image as the body of a form, as `curl -F file=@...` sends it."""
    part = (
        f"--{_BOUNDARY}\r\n"
        'Content-Disposition: form-data; name="file"; filename="photo.jpg"\r\n'
        "Content-Type: image/jpeg\r\n\r\n"
    )
    return part.encode() + image + f"\r\n--{_BOUNDARY}--\r\n".encode()


def upload(target: str, body: bytes) -> Request:
    """Return the request that posts a `form` to a path with its query."""
    return request("POST", target, body, f"multipart/form-data; boundary={_BOUNDARY}")


def request(
    method: str, target: str, body: bytes = b"", kind: str = "application/json", key: str = ""
) -> Request:
    """Return a request; `kind` is its body's, `key` goes into X-API-Key."""
    head = (
        f"{method} {target} HTTP/1.1\r\nHost: localhost\r\n"
        f"Content-Type: {kind}\r\nContent-Length: {len(body)}\r\n"
    )
    if key:
        head += f"X-API-Key: {key}\r\n"
    return Request(f"{head}\r\n".encode(), body)


class Connections:
    """Connections to one server, kept alive; as many as are needed at once."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._idle: list[tuple[float, asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def ask(self, request: Request) -> tuple[int, bytes]:
        """Send a request and return the status and the body of its answer.

        Raises:
            OSError, EOFError: if no answer comes.
        """
        reader, writer = await self._take()
        try:
            writer.writelines(request)
            head = await reader.readuntil(b"\r\n\r\n")
            found = _LENGTH.search(head)
            body = await reader.readexactly(int(found[1]) if found else 0)
        except BaseException:
            writer.close()
            raise
        if b"\r\nconnection: close" in head.lower():
            writer.close()
        else:
            self._idle.append((asyncio.get_running_loop().time(), reader, writer))
        return int(head[9:12]), body

    async def _take(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        now = asyncio.get_running_loop().time()
        while self._idle:
            # The last used first, so that those that are not needed grow old.
            used, reader, writer = self._idle.pop()
            if now - used < IDLE and not reader.at_eof():
                return reader, writer
            writer.close()
        return await asyncio.open_connection("127.0.0.1", self._port)

    def close(self) -> None:
        """Close those that are idle."""
        for _, _, writer in self._idle:
            writer.close()
        self._idle.clear()


def closed_loop(port: int, requests: Iterable[Request], concurrency: int) -> list[Exchange]:
    """Keep so many requests at work until all are answered; return them as they were sent."""

    async def run() -> list[Exchange]:
        connections = Connections(port)
        start = asyncio.get_running_loop().time()
        waiting = iter(requests)

        async def work() -> list[Exchange]:
            return [await _exchange(connections, request, start, None) for request in waiting]

        done = await asyncio.gather(*(work() for _ in range(concurrency)))
        connections.close()
        return sorted(itertools.chain(*done), key=lambda exchange: exchange.sent)

    with _without_pauses():
        return run_loop(run())


async def open_loop(
    port: int,
    plan: Sequence[float],
    requests: Iterable[Request],
    stop: asyncio.Event | None = None,
) -> list[Exchange]:
    """Send each request at its time, whatever became of the others.

    Args:
        port: of the server.
        plan: when to send, in seconds from now, ascending.
        requests: as many.
        stop: once it is set nothing more is sent.
    """
    loop = asyncio.get_running_loop()
    begun = loop.time()
    connections = Connections(port)
    tasks = []
    with _without_pauses():
        for planned, request in zip(plan, requests, strict=True):
            if (wait := begun + planned - loop.time()) > 0:
                await asyncio.sleep(wait)
            if stop and stop.is_set():
                break
            tasks.append(asyncio.create_task(_exchange(connections, request, begun, planned)))
        done = await asyncio.gather(*tasks)
    connections.close()
    return done


async def _exchange(
    connections: Connections, request: Request, start: float, planned: float | None
) -> Exchange:
    clock = asyncio.get_running_loop().time
    sent = clock() - start
    try:
        status, body = await asyncio.wait_for(connections.ask(request), TIMEOUT)
    except (OSError, EOFError, asyncio.TimeoutError) as error:
        status, body = 0, repr(error).encode()
    return Exchange(sent if planned is None else planned, sent, clock() - start, status, body)


@contextmanager
def _without_pauses() -> Iterator[None]:
    """Keep the garbage collector from stopping the load, which is bounded and ends soon."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def run_loop(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine on an event loop that wakes on time: epoll's clock counts milliseconds."""
    loop = asyncio.SelectorEventLoop(selectors.SelectSelector())
    with closing(loop):
        return loop.run_until_complete(coroutine)


@contextmanager
def first_in_line() -> Iterator[None]:
    """Let this thread run before all others, if it may, as if it had a core of its own.

    Without that a client beside a busy server sends late, and the plan is not what was measured;
    its answers tell by how much.
    """
    try:
        real_time = os.SCHED_RR | os.SCHED_RESET_ON_FORK
        os.sched_setscheduler(0, real_time, os.sched_param(1))
    except (AttributeError, OSError):
        yield
        return
    try:
        yield
    finally:
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
