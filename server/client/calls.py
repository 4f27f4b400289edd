"""What clients send and how they read the answer; sending is left to them.

Needs neither torch nor the server, only its schemas.
"""

import base64
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, field
from io import BytesIO
from itertools import islice
from os import PathLike, fspath
from pathlib import Path
from typing import Any, Generic, Literal, TypeAlias, TypeVar
from urllib.parse import quote

import httpx
import numpy as np
from PIL import ImageOps
from PIL.Image import Image as Picture
from pydantic import BaseModel, ValidationError
from pydantic_core import to_json
from typing_extensions import TypedDict

from server.schemas import (
    BatchLine,
    Classification,
    Classifications,
    Embedding,
    Embeddings,
    ModelDetail,
    ModelList,
    ModelSummary,
    Problem,
    Segmentation,
    Status,
)

T = TypeVar("T")

#: A path, the bytes of a JPEG, PNG or WebP file, or a picture of Pillow.
Image: TypeAlias = str | PathLike[str] | bytes | Picture

#: Images in one request of a stream: the server keeps as many results for who does not read yet.
MAX_PER_REQUEST = 256

#: What Pillow writes as PNG as it is.
_PNG_MODES = frozenset(("1", "I;16", "L", "LA", "P", "RGB", "RGBA"))


class RateOptions(TypedDict, total=False):
    """Which model to ask, at which rate and by when; all as the server's parameters."""

    rate: int | Literal["auto", "cascade"]
    budget: float | None
    agreement: float | None
    ladder: str | None
    min_rate: int | None
    max_rate: int | None
    deadline_ms: int | None
    model: str | None
    compensate: bool


class ClassifyOptions(RateOptions, total=False):
    """What to tell of a classification."""

    top_k: int | None
    logits: bool
    merge_map: bool


class EmbedOptions(RateOptions, total=False):
    """What to do with features."""

    normalize: bool


class SegmentedImage(Segmentation):
    """The answer to a request for the class of every pixel."""

    @property
    def class_map(self) -> np.ndarray:
        """The class [H, W] of each pixel, as bytes."""
        classes, lengths = np.array(self.runs).reshape(-1, 2).T
        return np.repeat(classes.astype(np.uint8), lengths).reshape(self.size)


class SegmentedImages(BaseModel):
    """The answers to several images, in their order."""

    results: list[SegmentedImage | Problem]


class ToComServerError(Exception):
    """The server's refusal, or a success that is none of its answers.

    Attributes:
        problem: what it said; made up from the status if something else has answered.
        retry_after: seconds after which it can be tried again, if it said so.
    """

    def __init__(self, problem: Problem, retry_after: float | None = None) -> None:
        super().__init__(f"{problem.status} {problem.title}: {problem.detail}")
        self.problem = problem
        self.retry_after = retry_after

    @property
    def status(self) -> int:
        """The HTTP status."""
        return self.problem.status


@dataclass(frozen=True)
class Call(Generic[T]):
    """A request and how its answer is read.

    Attributes:
        parse: makes the result of the answer's content.
        body: what is sent.
        images: sent instead, as lines of JSON that are made one by one.
    """

    method: str
    path: str
    parse: Callable[[bytes], T]
    params: Mapping[str, Any] = field(default_factory=dict)
    body: bytes | None = None
    content_type: str | None = None
    images: Sequence[Image] = ()


def classify(image: Image, options: ClassifyOptions) -> Call[Classification]:
    """Ask what an image shows."""
    return _single("/v1/classify", image, options, Classification.model_validate_json)


def classify_many(
    images: Iterable[Image], options: ClassifyOptions
) -> Call[list[Classification | Problem]]:
    """Ask what some images show."""
    return _several(
        "/v1/classify",
        images,
        options,
        lambda content: Classifications.model_validate_json(content).results,
    )


def embed(image: Image, options: EmbedOptions) -> Call[Embedding]:
    """Ask for the features of an image."""
    return _single("/v1/embed", image, options, Embedding.model_validate_json)


def embed_many(images: Iterable[Image], options: EmbedOptions) -> Call[list[Embedding | Problem]]:
    """Ask for the features of some images."""
    return _several(
        "/v1/embed",
        images,
        options,
        lambda content: Embeddings.model_validate_json(content).results,
    )


def segment(image: Image, options: RateOptions) -> Call[SegmentedImage]:
    """Ask for the class of every pixel."""
    return _single("/v1/segment", image, options, SegmentedImage.model_validate_json)


def segment_many(
    images: Iterable[Image], options: RateOptions
) -> Call[list[SegmentedImage | Problem]]:
    """Ask for the class of every pixel of some images."""
    return _several(
        "/v1/segment",
        images,
        options,
        lambda content: SegmentedImages.model_validate_json(content).results,
    )


def models() -> Call[list[ModelSummary]]:
    """Ask for all models."""
    return Call("GET", "/v1/models", lambda content: ModelList.model_validate_json(content).models)


def model(name: str) -> Call[ModelDetail]:
    """Ask for one model."""
    return Call("GET", f"/v1/models/{quote(name, safe='')}", ModelDetail.model_validate_json)


def status() -> Call[Status]:
    """Ask what the server has to do."""
    return Call("GET", "/v1/status", Status.model_validate_json)


class Batch:
    """Many images as requests of some, and their lines as if there were one request.

    Args:
        images: any number; a generator is asked for them as they are sent.
        per_request: how many to send at once.

    Raises:
        ValueError: if that is more than the server keeps the results of.
    """

    def __init__(self, images: Iterable[Image], per_request: int, options: ClassifyOptions) -> None:
        if not 1 <= per_request <= MAX_PER_REQUEST:
            raise ValueError(f"per_request must be in 1..{MAX_PER_REQUEST}, got {per_request}")
        self._images = iter(images)
        self._total = len(images) if isinstance(images, Sized) else None
        self._per_request = per_request
        self._params = _params(options)
        self._sent = self._before = self._done = 0

    def calls(self) -> Iterator[Call[bytes]]:
        """Yield the requests; the lines of each are to be read before the next."""
        while images := tuple(islice(self._images, self._per_request)):
            self._before = self._sent
            self._sent += len(images)
            yield Call(
                "POST",
                "/v1/classify/batch",
                bytes,
                self._params,
                content_type="application/x-ndjson",
                images=images,
            )

    def read(self, line: bytes, response: httpx.Response) -> BatchLine:
        """Read a line of the answer to the request that was yielded last.

        Raises:
            ToComServerError: if it says that the batch has ended before its time, or is no line
                of the server's.
        """
        try:
            read = BatchLine.model_validate_json(line)
        except ValidationError as error:
            raise misread(response, line.decode(errors="replace")) from error
        if read.index is None:
            assert read.error is not None
            raise ToComServerError(read.error)
        self._done += 1
        return read.model_copy(
            update={
                "index": self._before + read.index,
                "done": self._done,
                "total": self._total,
            }
        )

    def check_end(self, response: httpx.Response) -> None:
        """Check that the answer to that request, which has ended, had a line for each image.

        Raises:
            httpx.RemoteProtocolError: saying how many of how many it had.
        """
        answered, sent = self._done - self._before, self._sent - self._before
        if answered < sent:
            raise httpx.RemoteProtocolError(
                f"the answer ended after {answered} of {sent} images", request=response.request
            )


def encode_line(image: Image) -> bytes:
    """Return an image as a line of JSON, by the name of its file if it has one."""
    return to_json(_in_json(image)) + b"\n"


def refusal(response: httpx.Response) -> ToComServerError:
    """Return what an answer says that is not the one that was asked for."""
    after = response.headers.get("Retry-After", "")
    retry_after = float(after) if after.isdecimal() else None
    try:
        problem = Problem.model_validate_json(response.content)
    except ValidationError:
        problem = _problem(response, response.text[:500])
    return ToComServerError(problem, retry_after)


def misread(response: httpx.Response, text: str) -> ToComServerError:
    """Return that a success, of which this is all or a line, is not what was asked for."""
    return ToComServerError(_problem(response, f"not an answer of ToCom Serve: {text[:500]!r}"))


def _problem(response: httpx.Response, detail: str) -> Problem:
    """Make up what something else than the server would have said."""
    return Problem(
        type="about:blank",
        title=response.reason_phrase,
        status=response.status_code,
        detail=detail,
        instance=response.url.path,
        error=detail,
        request_id=response.headers.get("X-Request-Id", ""),
    )


def _single(
    path: str, image: Image, options: Mapping[str, Any], parse: Callable[[bytes], T]
) -> Call[T]:
    data = _read(image)
    return Call("POST", path, parse, _params(options), data, "application/octet-stream")


def _several(
    path: str, images: Iterable[Image], options: Mapping[str, Any], parse: Callable[[bytes], T]
) -> Call[T]:
    body = to_json({"images": [_in_json(image) for image in images]})
    return Call("POST", path, parse, _params(options), body, "application/json")


def _params(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _in_json(image: Image) -> dict[str, str]:
    name = {"name": fspath(image)} if isinstance(image, str | PathLike) else {}
    return name | {"b64": base64.b64encode(_read(image)).decode()}


def _read(image: Image) -> bytes:
    if isinstance(image, bytes):
        return image
    if not isinstance(image, Picture):
        return Path(image).read_bytes()
    image = ImageOps.exif_transpose(image)  # a PNG would not say how it is turned
    if image.mode not in _PNG_MODES:
        image = image.convert("RGB")
    buffer = BytesIO()
    image.save(buffer, "PNG", compress_level=1)  # loses nothing; small matters less than soon
    return buffer.getvalue()
