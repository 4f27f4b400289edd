"""The numbers of large JSON, read in slices.

A parser of JSON holds the interpreter's lock until it is done: for the pixels of some images a
fifth of a second, in which the event loop stands still. So arrays of numbers are cut out of the
text and read piece by piece. Whatever is not an even array of numbers stays in the text, for the
parser and its errors.
"""

import math
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from pydantic_core import from_json

#: Bytes that are worked on at a time: about two milliseconds.
SLICE = 2**18

_KEY = re.compile(rb'"data"\s{0,64}:\s{0,64}(?=\[)')
_OTHER = re.compile(rb"[^0-9+\-.eE,\s\[\]]")
_BLANK, _BRACKETS = b" \t\r\n", b"[]"
_NUMBER = b"0123456789+-.eE" + _BLANK


class Numbers(NamedTuple):
    """An array of JSON.

    Attributes:
        outline: its brackets and commas.
        values: [n] what stands between them, in fp64.
    """

    outline: bytes
    values: np.ndarray

    def is_of(self, shape: Sequence[int]) -> bool:
        """Tell whether it is an array of this shape, whose innermost dimensions may be flat."""
        if math.prod(shape) != len(self.values):
            return False
        return any(self.outline == _outline(shape, depth) for depth in range(1, len(shape) + 1))


def cut(text: bytes | bytearray) -> tuple[bytes, list[Numbers]]:
    """Take the numbers out of a text.

    Args:
        text: JSON.

    Returns:
        The text with `[k]` in place of each array of numbers that is called `data`, and the arrays.
    """
    found: list[Numbers] = []
    kept: list[bytes | bytearray] = []
    at = done = 0
    while (at := text.find(b'"data"', at)) >= 0:
        key = _KEY.match(text, at)
        if key is None or text[at - 1 : at] == b"\\":
            at += 1
            continue
        array = _array(text, key.end())
        at = key.end() + len(array)
        outline = _drop(array, _NUMBER)
        if outline.count(b"[") != outline.count(b"]"):
            continue
        try:
            numbers = Numbers(outline, _values(array))
        except (OverflowError, ValueError):
            continue
        kept += text[done : key.end()], b"[%d]" % len(found)
        found.append(numbers)
        done = at
    return b"".join([*kept, text[done:]]), found


def _array(text: bytes | bytearray, start: int) -> bytes | bytearray:
    """Return what begins at a position and may be an array of numbers."""
    for at in range(start, len(text), SLICE):
        if other := _OTHER.search(text, at, at + SLICE):
            return text[start : other.start()].rstrip(b"," + _BLANK)
    return text[start:]


def _drop(array: bytes | bytearray, characters: bytes) -> bytes:
    pieces = (array[at : at + SLICE] for at in range(0, len(array), SLICE))
    return b"".join(piece.translate(None, characters) for piece in pieces)


def _values(array: bytes | bytearray) -> np.ndarray:
    """Return the numbers between the brackets; ValueError if there is anything else."""
    pieces = [np.array(from_json(piece), np.float64) for piece in _pieces(array)]
    return np.concatenate(pieces)


def _pieces(array: bytes | bytearray) -> Iterator[bytes]:
    at = 0
    while at < len(array):
        end = array.find(b",", at + SLICE)
        end = len(array) if end < 0 else end
        yield b"[" + array[at:end].translate(None, _BRACKETS) + b"]"
        at = end + 1


def _outline(shape: Sequence[int], depth: int) -> bytes:
    """Return the brackets and commas of an array with so many levels of lists."""
    outline = b"[" + b"," * (math.prod(shape[depth - 1 :]) - 1) + b"]"
    for size in reversed(shape[: depth - 1]):
        outline = b"[" + b",".join([outline] * size) + b"]"
    return outline
