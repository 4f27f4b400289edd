"""Clients of the server: `Client` and, for asyncio, `AsyncClient`.

    with Client("http://localhost:8000") as client:
        answer = client.classify("photo.jpg", rate=2)

Answers are the server's own schemas. What the server refuses is a ToComServerError, as is an
answer that is not its own; that it cannot be reached, or is lost before all of its answer came, is
an httpx.TransportError.
"""

import asyncio
import time
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Iterator
from contextlib import aclosing, closing
from typing import Any, TypeVar

import httpx
from pydantic import ValidationError
from typing_extensions import Self, Unpack

from server.client import calls
from server.client.calls import (
    Call,
    ClassifyOptions,
    EmbedOptions,
    Image,
    RateOptions,
    SegmentedImage,
)
from server.client.retry import LOST, Tries
from server.schemas import (
    BatchLine,
    Classification,
    Embedding,
    ModelDetail,
    ModelSummary,
    Problem,
    Status,
)

T = TypeVar("T")

DEFAULT_URL = "http://127.0.0.1:8000"


class Client:
    """A client whose calls block. Several threads may share it."""

    def __init__(
        self,
        url: str = DEFAULT_URL,
        *,
        api_key: str | None = None,
        retries: int = 0,
        timeout: float = 60.0,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        """Describe a client; it connects with its first call.

        Args:
            url: of the server.
            api_key: if the server wants one.
            retries: how often a call is tried again: one that found the server full (503) or its
                quota used up (429) after the time that the server names, and one whose connection
                was refused, or lost before its answer came, soon, while its `deadline_ms` and the
                timeout last.
            timeout: seconds without a sign of the server after which a call fails.
            transport: in place of the network.
        """
        self._retries = retries
        self._timeout = timeout
        self._http = httpx.Client(
            base_url=url, headers=_headers(api_key), timeout=timeout, transport=transport
        )

    def classify(self, image: Image, **options: Unpack[ClassifyOptions]) -> Classification:
        """Return what an image shows.

        Args:
            image: a path, the bytes of a file or a picture of Pillow.
            options: the parameters of `POST /v1/classify`.

        Raises:
            ToComServerError: if the server cannot answer.
        """
        return self._send(calls.classify(image, options))

    def classify_many(
        self, images: Iterable[Image], **options: Unpack[ClassifyOptions]
    ) -> list[Classification | Problem]:
        """Return what each of some images shows, or why that one has no answer, in their order.

        They are one request: the server says how many that may be.
        """
        return self._send(calls.classify_many(images, options))

    def embed(self, image: Image, **options: Unpack[EmbedOptions]) -> Embedding:
        """Return the features of an image; options are the parameters of `POST /v1/embed`."""
        return self._send(calls.embed(image, options))

    def embed_many(
        self, images: Iterable[Image], **options: Unpack[EmbedOptions]
    ) -> list[Embedding | Problem]:
        """Return the features of each of some images, or why there are none, in their order."""
        return self._send(calls.embed_many(images, options))

    def segment(self, image: Image, **options: Unpack[RateOptions]) -> SegmentedImage:
        """Return the class of every pixel; options are the parameters of `POST /v1/segment`."""
        return self._send(calls.segment(image, options))

    def segment_many(
        self, images: Iterable[Image], **options: Unpack[RateOptions]
    ) -> list[SegmentedImage | Problem]:
        """Return the class of every pixel of some images, or why there is none, in their order."""
        return self._send(calls.segment_many(images, options))

    def stream_batch(
        self,
        images: Iterable[Image],
        *,
        per_request: int = 64,
        **options: Unpack[ClassifyOptions],
    ) -> Iterator[BatchLine]:
        """Classify any number of images, which the server does when it has nothing urgent to do.

        Args:
            images: are read as they are sent.
            per_request: how many the server is sent at once, 1..256.
            options: the parameters of `POST /v1/classify/batch`.

        Yields:
            What each image shows, or why there is no answer, as soon as that is known. `index`
            tells which image it is; one that was given as a path has it as its `name`.

        Raises:
            ToComServerError: if the server ends a batch before its time.
            httpx.TransportError: if it is lost, or an answer ends before all of its lines came.
        """
        batch = calls.Batch(images, per_request, options)
        for call in batch.calls():
            with closing(self._ask(call)) as response:
                for line in _split(response.iter_bytes()):
                    yield batch.read(line, response)
                batch.check_end(response)

    def models(self) -> list[ModelSummary]:
        """Return all models, the default one first."""
        return self._send(calls.models())

    def model(self, name: str) -> ModelDetail:
        """Return all that is known of a model."""
        return self._send(calls.model(name))

    def status(self) -> Status:
        """Return what the server has to do just now."""
        return self._send(calls.status())

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _send(self, call: Call[T]) -> T:
        return _parse(call, self._ask(call))

    def _ask(self, call: Call[Any]) -> httpx.Response:
        """Return the answer to a call: all of it, or its head if it comes line by line."""
        tries = Tries(call, self._retries, self._timeout)
        while True:
            lines = map(calls.encode_line, call.images) if call.images else call.body
            request = self._http.build_request(**_request(tries.call), content=lines)
            try:
                response = self._http.send(request, stream=bool(call.images))
                if response.is_success:
                    return response
                response.read()
            except LOST as error:
                delay = tries.after_loss(error)
            else:
                delay = tries.after_refusal(response)
            time.sleep(delay)


class AsyncClient:
    """A client for asyncio; its methods are those of `Client`."""

    def __init__(
        self,
        url: str = DEFAULT_URL,
        *,
        api_key: str | None = None,
        retries: int = 0,
        timeout: float = 60.0,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        """See `Client`."""
        self._retries = retries
        self._timeout = timeout
        self._http = httpx.AsyncClient(
            base_url=url, headers=_headers(api_key), timeout=timeout, transport=transport
        )

    async def classify(self, image: Image, **options: Unpack[ClassifyOptions]) -> Classification:
        """See `Client`."""
        return await self._send(await asyncio.to_thread(calls.classify, image, options))

    async def classify_many(
        self, images: Iterable[Image], **options: Unpack[ClassifyOptions]
    ) -> list[Classification | Problem]:
        """See `Client`."""
        return await self._send(await asyncio.to_thread(calls.classify_many, images, options))

    async def embed(self, image: Image, **options: Unpack[EmbedOptions]) -> Embedding:
        """See `Client`."""
        return await self._send(await asyncio.to_thread(calls.embed, image, options))

    async def embed_many(
        self, images: Iterable[Image], **options: Unpack[EmbedOptions]
    ) -> list[Embedding | Problem]:
        """See `Client`."""
        return await self._send(await asyncio.to_thread(calls.embed_many, images, options))

    async def segment(self, image: Image, **options: Unpack[RateOptions]) -> SegmentedImage:
        """See `Client`."""
        return await self._send(await asyncio.to_thread(calls.segment, image, options))

    async def segment_many(
        self, images: Iterable[Image], **options: Unpack[RateOptions]
    ) -> list[SegmentedImage | Problem]:
        """See `Client`."""
        return await self._send(await asyncio.to_thread(calls.segment_many, images, options))

    async def stream_batch(
        self,
        images: Iterable[Image],
        *,
        per_request: int = 64,
        **options: Unpack[ClassifyOptions],
    ) -> AsyncIterator[BatchLine]:
        """See `Client`."""
        batch = calls.Batch(images, per_request, options)
        for call in batch.calls():
            async with aclosing(await self._ask(call)) as response:
                async for line in _split_async(response.aiter_bytes()):
                    yield batch.read(line, response)
                batch.check_end(response)

    async def models(self) -> list[ModelSummary]:
        """See `Client`."""
        return await self._send(calls.models())

    async def model(self, name: str) -> ModelDetail:
        """See `Client`."""
        return await self._send(calls.model(name))

    async def status(self) -> Status:
        """See `Client`."""
        return await self._send(calls.status())

    async def close(self) -> None:
        """See `Client`."""
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _send(self, call: Call[T]) -> T:
        return _parse(call, await self._ask(call))

    async def _ask(self, call: Call[Any]) -> httpx.Response:
        tries = Tries(call, self._retries, self._timeout)
        while True:
            lines = _lines(call.images) if call.images else call.body
            request = self._http.build_request(**_request(tries.call), content=lines)
            try:
                response = await self._http.send(request, stream=bool(call.images))
                if response.is_success:
                    return response
                await response.aread()
            except LOST as error:
                delay = tries.after_loss(error)
            else:
                delay = tries.after_refusal(response)
            await asyncio.sleep(delay)


async def _lines(images: Iterable[Image]) -> AsyncIterator[bytes]:
    for image in images:
        yield await asyncio.to_thread(calls.encode_line, image)


def _split(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Yield the lines of an answer."""
    # Not by httpx's iter_lines, which also splits at what JSON leaves as it is: U+2028 in a name.
    begun = b""
    for chunk in chunks:
        *lines, begun = (begun + chunk).split(b"\n")
        yield from lines
    if begun:
        yield begun


async def _split_async(chunks: AsyncIterable[bytes]) -> AsyncIterator[bytes]:
    """See `_split`."""
    begun = b""
    async for chunk in chunks:
        *lines, begun = (begun + chunk).split(b"\n")
        for line in lines:
            yield line
    if begun:
        yield begun


def _parse(call: Call[T], response: httpx.Response) -> T:
    """Return what a success says.

    Raises:
        ToComServerError: if it is not the server's.
    """
    try:
        return call.parse(response.content)
    except ValidationError as error:
        raise calls.misread(response, response.text) from error


def _headers(api_key: str | None) -> dict[str, str]:
    return {} if api_key is None else {"Authorization": f"Bearer {api_key}"}


def _request(call: Call[Any]) -> dict[str, Any]:
    headers = {"Content-Type": call.content_type} if call.content_type else {}
    return {"method": call.method, "url": call.path, "params": call.params, "headers": headers}
