"""Images that are answered one by one while others of the same request are still arriving.

A request may be endless: only so many of its images are in memory at once, and reading waits
for them. They are work for the background: without a deadline every request that has one goes
first, and half of the places in the queue stay free for those.
"""

import asyncio
import math
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

from anyio import fail_after
from fastapi import Request
from pydantic import ValidationError
from starlette.requests import ClientDisconnect

from adapters.schema import first_fault
from server.engine.job import Answer
from server.errors import (
    DeadlineError,
    ParameterError,
    QueueFullError,
    ShortDeadlineError,
    TooLargeError,
    UnavailableError,
    UnsupportedTypeError,
    UploadTimeoutError,
)
from server.inference.cascade import submit_all
from server.inference.run import AnyWork
from server.models.pictures import prepare
from server.models.served import ServedModel
from server.v1 import uploads
from server.web import multipart
from server.web.access import charge_when_allowed, priority_of
from server.web.ahead import Ahead
from server.web.body import FORM, content_type
from server.web.multipart import File
from server.web.serving import Serving
from tocom import TocomError

#: Types of a body whose lines are JSON, the best known one first.
LINES = ("application/x-ndjson", "application/ndjson", "application/jsonl")

#: Results that are kept for a client which does not read them: many clients send the whole of
#: a request before they read anything of its answer.
UNREAD = 256

#: Images without an answer after which a request is taken for a mistake, or worse.
FAILURES = 1000

#: Seconds between two looks whether there is room in the queue.
PATIENCE = 0.02

_HOW = (
    f"send images as form fields {multipart.FIELD!r} ({FORM}) or as lines of JSON "
    f'({LINES[0]}): {{"name": "photo.jpg", "b64": "..."}}'
)


@dataclass(frozen=True)
class Outcome:
    """What became of an image.

    Attributes:
        index: its place in the request.
        name: what the client calls it.
        arrived: when it did, in the engine's time.
        answer: the engine's, or why there is none.
    """

    index: int
    name: str | None
    arrived: float
    answer: Answer | BaseException


@dataclass(frozen=True)
class _End:
    """No more images will be taken: there are none, or there was a failure."""

    failure: Exception | None


class Stream:
    """The images of a request on their way through the engine.

    Attributes:
        done: images that have an outcome.
        total: images in the request; None while it is still arriving.
    """

    def __init__(
        self, request: Request, serving: Serving, model: ServedModel, work: AnyWork, deadline: float
    ) -> None:
        """Describe a stream; nothing is read yet.

        Args:
            request: holds the images; its client is watched.
            serving: has the engine.
            model: what the images are prepared for.
            work: what to do with each.
            deadline: when all must be done, in the engine's time; may be infinite.
        """
        settings = serving.settings
        self.done = 0
        self.total: int | None = None
        self._request = request
        self._serving = serving
        self._model = model
        self._work = work
        self._deadline = deadline
        self._ahead = Ahead(request.receive)
        body = Request(request.scope, self._ahead.receive)
        self._images = arriving(body, settings.max_body_bytes)
        self._taken = 0
        self._running: set[Future[Answer]] = set()
        self._held = 0  # bytes of images that were taken and are not done
        self._fewer = asyncio.Event()
        self._hold(0)
        self._window = asyncio.Semaphore(settings.batch_window or 2 * settings.max_batch)
        self._unread = asyncio.Semaphore(UNREAD)
        self._events: asyncio.Queue[Outcome | _End | Exception] = asyncio.Queue()

    async def run(self) -> AsyncGenerator[Outcome, None]:
        """Yield what becomes of each image, in the order in which they are done.

        Raises:
            TocomError: if no more images can be read or taken, or if the deadline has passed;
                images without an outcome get none then.
            ClientDisconnect: if nobody waits for them any more.
        """
        # What it may hold at most: a body's bytes of images that were taken and of what was read
        # ahead, and an image that arrives. Taking a large one may leave more than that ahead, but
        # nothing of the next has arrived then, and no more is read until both fit again.
        reserved = 2 * self._serving.settings.max_body_bytes
        end: _End | None = None
        failed = 0
        with self._serving.budget.streaming(reserved), self._working():
            while end is None or self.done < self._taken:
                event = await self._events.get()
                if isinstance(event, Exception):
                    raise event
                if isinstance(event, _End):
                    end = event
                    continue
                self.done += 1
                yield event
                failed += isinstance(event.answer, TocomError)
                if failed > FAILURES:
                    raise TooLargeError(
                        f"more than {FAILURES:,} images of this request could not be answered; "
                        "the rest of it is not read"
                    )
                self._unread.release()
            if end.failure:
                raise end.failure

    @contextmanager
    def _working(self) -> Iterator[None]:
        """Read, and watch the client and the clock; what is not done at the end is given up."""
        tasks = [asyncio.create_task(self._read()), asyncio.create_task(self._watch())]
        timer = self._set_timer()
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            if timer:
                timer.cancel()
            for future in tuple(self._running):
                future.cancel()  # also takes the image out of the engine's queue

    def _set_timer(self) -> asyncio.TimerHandle | None:
        if math.isinf(self._deadline):
            return None
        late = DeadlineError("the deadline passed before all images were done")
        left = self._deadline - self._serving.engine.clock()
        return asyncio.get_running_loop().call_later(left, self._events.put_nowait, late)

    async def _read(self) -> None:
        """Take image after image."""
        failure = None
        try:
            while (image := await self._next()) is not None:
                await self._take(image)
            self.total = self._taken
        except Exception as error:  # whatever it is, those that were taken are answered first
            failure = error
        self._events.put_nowait(_End(failure))
        self._ahead.drop()

    async def _watch(self) -> None:
        """Tell that the client has gone, also while there is no room for more of its images."""
        if await self._ahead.watch():
            self._events.put_nowait(ClientDisconnect())

    async def _next(self) -> File | TocomError | None:
        timeout = self._serving.settings.timeout_ms / 1000
        try:
            # Not wait_for(), which may lose that it is cancelled.
            with fail_after(timeout):
                return await anext(self._images, None)
        except TimeoutError:
            raise UploadTimeoutError(f"no image arrived within {timeout:g} s") from None

    async def _take(self, image: File | TocomError) -> None:
        """Give the engine an image as soon as there is room for it."""
        if self._serving.stopping.is_set():
            raise UnavailableError("the server is shutting down")
        await self._unread.acquire()
        arrived = self._serving.engine.clock()
        if isinstance(image, TocomError):
            self._events.put_nowait(Outcome(self._taken, None, arrived, image))
        else:
            await self._window.acquire()
            if self._taken > 0:  # the first was charged when the request was let in
                await charge_when_allowed(self._request)
            size = len(image.data)
            await self._make_room(size)
            future = await self._submit(image.data)
            self._running.add(future)
            self._hold(size)
            finish = partial(self._finish, self._taken, image.name, arrived, size)
            loop = asyncio.get_running_loop()
            future.add_done_callback(partial(loop.call_soon_threadsafe, finish))
        self._taken += 1

    def _hold(self, size: int) -> None:
        """Count so many bytes more of images; what they leave of a body's is for reading ahead."""
        self._held += size
        self._ahead.allow(self._serving.settings.max_body_bytes - self._held)
        self._fewer.set()

    async def _make_room(self, size: int) -> None:
        """Wait until an image of so many bytes can be held beside those that are not done."""
        while self._held and self._held + size > self._serving.settings.max_body_bytes:
            self._fewer.clear()
            await self._fewer.wait()

    async def _submit(self, data: bytes) -> Future[Answer]:
        engine, priority = self._serving.engine, priority_of(self._request)
        preparation = partial(prepare, data, self._model, self._serving.settings)
        while True:
            try:
                engine.check_room(1 + engine.max_queue // 2)
                (image,) = submit_all(
                    engine, self._work, [preparation], self._deadline, priority=priority
                )
                return image
            except (QueueFullError, DeadlineError):
                pass  # whether the deadline has passed, the timer tells
            except ShortDeadlineError:
                if not self._taken:
                    raise
                # It was long enough for some.
                late = "the deadline is too near for the images that are left"
                raise DeadlineError(late) from None
            await asyncio.sleep(PATIENCE)

    def _finish(
        self, index: int, name: str | None, arrived: float, size: int, future: Future[Answer]
    ) -> None:
        self._running.discard(future)
        self._window.release()
        self._hold(-size)
        if not future.cancelled():
            answer = future.exception() or future.result()
            self._events.put_nowait(Outcome(index, name, arrived, answer))


async def arriving(request: Request, max_bytes: int) -> AsyncIterator[File | TocomError]:
    """Yield the images of a request as they arrive; an error in place of a line that has none.

    Raises:
        BadRequestError: if the body is a form and malformed.
        TooLargeError: if an image is larger than `max_bytes`.
        UnsupportedTypeError: if the body is something else by its Content-Type.
    """
    kind = content_type(request)
    if kind == FORM:
        async for file in multipart.read_files(request, max_bytes):
            yield file
    elif kind in LINES:
        async for line in _read_lines(request, max_bytes):
            try:
                parse = partial(uploads.EncodedImage.model_validate_json, line)
                image = await uploads.aside(parse, len(line))
                yield File(image.name, image.b64)
            except ValidationError as error:
                yield ParameterError(f"the line's {first_fault(error)}")
    else:
        raise UnsupportedTypeError(f"a body of type {kind[:100]!r} is not read here: {_HOW}")


async def _read_lines(request: Request, max_bytes: int) -> AsyncIterator[bytearray]:
    """Yield the lines of a body that are not blank."""
    unfinished = bytearray()
    async for chunk in request.stream():
        for piece in chunk.splitlines(keepends=True):
            unfinished += piece
            if len(unfinished) > max_bytes:
                raise TooLargeError(
                    f"a line is larger than the {max_bytes:,} bytes that are allowed"
                )
            if piece.endswith(b"\n"):
                line, unfinished = unfinished, bytearray()
                if not line.isspace():
                    yield line
    if unfinished and not unfinished.isspace():
        yield unfinished
