"""Requests and answers of the Open Inference Protocol as bytes.

JSON, or JSON followed by raw tensors in the order in which it lists them; the header
Inference-Header-Content-Length says where the JSON ends. Raw tensors are little-endian,
row-major and packed; an element of BYTES follows its length, 4 bytes.

Knows the datatypes FP32 and BYTES, all that the models here have, and nothing of models.
"""

import math
import reprlib
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, TypeVar

import numpy as np
from pydantic import BaseModel, ValidationError

from server.errors import BadRequestError, TooLargeError, UnsupportedTypeError
from server.oip.numbers import cut
from server.oip.schemas import (
    BinarySize,
    InferQuery,
    InferRequest,
    InferResponse,
    RequestInput,
    ResponseOutput,
)
from server.web.origins import JSON_LENGTH
from tocom.wording import words_of

Schema = TypeVar("Schema", bound=BaseModel)

#: Lists and objects that JSON may have. Nested pixels of 64 images have some 50,000; to make
#: millions takes seconds in which nothing else runs.
MAX_NESTED = 2**18

#: Bytes of JSON from which its numbers are read in slices.
LARGE = 2**18

_FP32 = np.dtype("<f4")
_LENGTH = struct.Struct("<I")


@dataclass(frozen=True)
class InputTensor:
    """A tensor as it was sent; what it holds is read only when it is asked for.

    Attributes:
        name, datatype, shape: as the request says.
        content: raw, or a list or numbers from JSON.
    """

    name: str
    datatype: str
    shape: tuple[int, ...]
    content: memoryview | list[Any] | np.ndarray

    @property
    def elements(self) -> int:
        """How many elements its shape has."""
        return math.prod(self.shape)

    def floats(self) -> np.ndarray:
        """Return the values of an FP32 tensor, in its shape; they may be a view of the body.

        Raises:
            BadRequestError: if there are more or fewer, or not all are numbers.
        """
        if isinstance(self.content, memoryview):
            self._check(len(self.content), self.elements * _FP32.itemsize, "bytes")
            return np.frombuffer(self.content, _FP32).reshape(self.shape)
        if isinstance(self.content, np.ndarray):
            return _rounded(self.content).reshape(self.shape)
        values = self._flat(self.content)
        try:
            # Not array(): that would look for lists inside, and take seconds over millions.
            numbers = np.fromiter(values, np.float64, len(values))
        except (OverflowError, TypeError, ValueError):
            raise BadRequestError(f"input {self.name!r}: its data must be numbers") from None
        return _rounded(numbers).reshape(self.shape)

    def strings(self) -> list[bytes]:
        """Return the elements of a BYTES tensor, those of JSON in UTF-8.

        Raises:
            BadRequestError: if there are more or fewer, or not all are strings.
        """
        if isinstance(self.content, memoryview):
            return self._unpack(self.content)
        values = [] if isinstance(self.content, np.ndarray) else self._flat(self.content)
        if not values or not all(isinstance(value, str) for value in values):
            raise BadRequestError(f"input {self.name!r}: its data must be strings")
        return [value.encode() for value in values]

    def _flat(self, values: list[Any]) -> list[Any]:
        """Return as many elements as the shape has, from lists inside each other or not."""
        for _ in self.shape[1:]:
            if not all(isinstance(each, list) for each in values):
                break
            values = list(chain.from_iterable(values))
        self._check(len(values), self.elements, "elements")
        return values

    def _unpack(self, raw: memoryview) -> list[bytes]:
        found = []
        at = 0
        for index in range(self.elements):
            start = at + _LENGTH.size
            end = start + (_LENGTH.unpack_from(raw, at)[0] if start <= len(raw) else 0)
            if max(start, end) > len(raw):
                raise BadRequestError(
                    f"input {self.name!r}: element {index} goes beyond its {len(raw)} bytes"
                )
            found.append(bytes(raw[start:end]))
            at = end
        self._check(len(raw), at, "bytes")
        return found

    def _check(self, came: int, wanted: int, what: str) -> None:
        if came != wanted:
            raise BadRequestError(
                f"input {self.name!r}: shape {list(self.shape)} has {wanted} {what}, {came} came"
            )


@dataclass(frozen=True)
class OutputTensor:
    """A tensor to answer: fp32 numbers, bytes or strings, and whether they go behind the JSON.

    Numbers in JSON must be finite: it has no others.
    """

    name: str
    values: np.ndarray
    binary: bool

    @property
    def datatype(self) -> str:
        """The protocol's name of what it holds."""
        return {"O": "BYTES", "u": "UINT8"}.get(self.values.dtype.kind, "FP32")

    def raw(self) -> bytes:
        """Return the values as they go behind the JSON."""
        if self.datatype == "FP32":
            return self.values.astype(_FP32).tobytes()
        if self.datatype == "UINT8":
            return self.values.tobytes()
        encoded = [value.encode() for value in self.values.ravel()]
        return b"".join(_LENGTH.pack(len(each)) + each for each in encoded)


def inflate(body: bytes | bytearray, encoding: str, limit: int) -> bytes | bytearray:
    """Undo the Content-Encoding of a body.

    Args:
        body: as it was sent.
        encoding: the header; empty without one.
        limit: bytes that it may have in the end.

    Raises:
        UnsupportedTypeError: if the encoding is none of gzip, deflate and identity.
        TooLargeError: if it would be larger; it was not inflated further then.
        BadRequestError: if it is damaged.
    """
    if encoding.lower() in ("", "identity"):
        return body
    if encoding.lower() not in ("gzip", "deflate"):
        raise UnsupportedTypeError(
            f"Content-Encoding must be gzip, deflate or identity, got {encoding[:40]!r}"
        )
    inflater = zlib.decompressobj(wbits=32 + zlib.MAX_WBITS)  # finds out which it is
    try:
        inflated = inflater.decompress(body, limit + 1)
    except zlib.error as error:
        raise BadRequestError(f"the body is not {encoding}: {error}") from None
    if len(inflated) > limit:
        raise TooLargeError(
            f"the inflated body is larger than the {limit:,} bytes that are allowed"
        )
    if not inflater.eof or inflater.unused_data:
        raise BadRequestError(f"the body does not end where its {encoding} ends")
    return inflated


def read_request(
    body: bytes | bytearray, header: str | None, raw_input: str
) -> tuple[InferRequest, list[InputTensor]]:
    """Read a request.

    Args:
        body: its bytes.
        header: Inference-Header-Content-Length, if it has one. 0: all of the body is one
            element of BYTES, and the answer is to be binary too.
        raw_input: name of the input that it is then.

    Raises:
        BadRequestError: if it is none.
    """
    length = len(body)
    if header is not None:
        # Few digits only: int() refuses thousands of them in its own words.
        if not (header.isascii() and header.isdigit() and len(header) < 20):
            raise BadRequestError(f"{JSON_LENGTH} must be a number of bytes, got {header[:40]!r}")
        length = int(header)
    if length > len(body):
        raise BadRequestError(f"{JSON_LENGTH} is {length}, and the body has {len(body)} bytes")
    if header is not None and length == 0:
        only = RequestInput(name=raw_input, shape=[1], datatype="BYTES")
        request = InferRequest(inputs=[only], parameters=InferQuery(binary_data_output=True))
        raw = memoryview(_LENGTH.pack(len(body)) + body)
        return request, [InputTensor(raw_input, "BYTES", (1,), raw)]
    text = body[:length]
    if len(text) > LARGE and (sliced := _read_sliced(text)):
        return sliced
    request = parse(InferRequest, text)
    return request, _inputs(request.inputs, memoryview(body)[length:])


def _read_sliced(text: bytes | bytearray) -> tuple[InferRequest, list[InputTensor]] | None:
    """Read a large request of JSON alone; None if its tensors are not even arrays of numbers."""
    _check_nested(text)
    rest, numbers = cut(text)
    if not numbers or len(rest) > LARGE:
        return None
    request = parse(InferRequest, rest)
    inputs = []
    for each in request.inputs:
        match each.data:
            case [int(place)] if each.parameters.binary_data_size is None and place < len(numbers):
                found = numbers[place]
                if not found.is_of(each.shape):
                    return None
                values = found.values
                inputs.append(InputTensor(each.name, each.datatype, tuple(each.shape), values))
            case _:
                return None
    return request, inputs


def parse(kind: type[Schema], text: bytes | bytearray) -> Schema:
    """Read JSON.

    Raises:
        BadRequestError: naming the entry that is wrong.
    """
    _check_nested(text)
    try:
        return kind.model_validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"])) or "body"
        came = first["input"]  # of JSON that cannot be read: all of the body
        got = repr(came[:20]) if isinstance(came, bytes) else reprlib.repr(came)
        raise BadRequestError(
            f"the request cannot be read: {where}: {words_of(first)}, got {got}"
        ) from None


def _check_nested(text: bytes | bytearray) -> None:
    if (nested := text.count(b"[") + text.count(b"{")) > MAX_NESTED:
        raise BadRequestError(
            f"the request has {nested:,} lists and objects; {MAX_NESTED:,} are allowed"
        )


def _rounded(numbers: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):  # what is too large becomes infinite
        return numbers.astype(_FP32)


def _inputs(described: Sequence[RequestInput], raw: memoryview) -> list[InputTensor]:
    """Give each input what is its own."""
    found = []
    at = 0
    for each in described:
        size = each.parameters.binary_data_size
        if (size is None) == (each.data is None):
            raise BadRequestError(
                f"input {each.name!r} must have either data or binary_data_size; there is no "
                "shared memory here"
            )
        if size is not None and at + size > len(raw):
            raise BadRequestError(
                f"input {each.name!r}: {size} bytes from {at} on go beyond the {len(raw)} bytes "
                "behind the JSON"
            )
        content = each.data if size is None else raw[at : at + size]
        assert content is not None
        found.append(InputTensor(each.name, each.datatype, tuple(each.shape), content))
        at += size or 0
    if at < len(raw):
        raise BadRequestError(f"the body has {len(raw) - at} bytes that belong to no input")
    return found


def write_response(
    response: InferResponse, outputs: Sequence[OutputTensor]
) -> tuple[bytes, int | None]:
    """Write an answer.

    Args:
        response: gets the outputs.
        outputs: in the order in which they are to be there.

    Returns:
        Its body and the bytes of that which are JSON; None: all.
    """
    behind = []
    for output in outputs:
        described = ResponseOutput(
            name=output.name, datatype=output.datatype, shape=list(output.values.shape)
        )
        if output.binary:
            behind.append(output.raw())
            described.parameters = BinarySize(binary_data_size=len(behind[-1]))
        else:
            described.data = output.values.ravel().tolist()
        response.outputs.append(described)
    text = response.model_dump_json(exclude_none=True).encode()
    if not behind:
        return text, None
    return b"".join([text, *behind]), len(text)
