"""Base64, decoded in slices.

Decoding holds the interpreter's lock: of a large upload for a tenth of a second, in which the event
loop would stand still.
"""

import base64
from collections.abc import Iterator

#: Characters that are decoded at a time.
SLICE = 2**20


def decode(text: str, start: int = 0, broken: bool = False) -> bytes:
    """Return what a text holds.

    Args:
        text: base64.
        start: where it begins.
        broken: whether white space is allowed in it: many programs break base64 into lines.

    Raises:
        ValueError: if it is not base64.
    """
    return b"".join(_pieces(text, start, broken))


def _pieces(text: str, start: int, broken: bool) -> Iterator[bytes]:
    rest, padded = "", False
    for at in range(start, len(text), SLICE):
        piece = text[at : at + SLICE]
        rest += "".join(piece.split()) if broken else piece
        if padded and rest:
            raise ValueError("Excess data after padding")
        whole = len(rest) - len(rest) % 4
        yield base64.b64decode(rest[:whole], validate=True)
        padded, rest = rest[:whole].endswith("="), rest[whole:]
    if padded and rest:
        raise ValueError("Excess data after padding")
    yield base64.b64decode(rest, validate=True)
