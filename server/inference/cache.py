"""Answers that are kept, so that the same picture need not run twice.

What is kept is what the model said of a picture's bytes: classes, features and more are made of it.
It is found again only by who asked for it, unless keys share the cache, and only for the same model
on the same ladder, at the same rate, with the same bank. Not for several threads: the event loop
owns it.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Callable
from typing import NamedTuple

from server.engine.job import Answer
from server.models.served import AutoWork, Output, RateWork
from server.settings import Settings

#: Bytes that an answer takes beside its numbers: its key and the objects around them.
AROUND = 2048

#: Tells that answers were found, and how many were not.
LookedUp = Callable[[int, int], None]


class _Key(NamedTuple):
    """All that an answer depends on."""

    caller: str | None
    picture: bytes  # SHA-256
    model: str
    ladder: str
    rate: int
    compensate: bool
    trace: bool
    bank: str | None  # also without compensation: it says how tokens count in attention


class AnswerCache:
    """See the module; the answers that were of use longest ago make room for new ones."""

    def __init__(self, settings: Settings, looked_up: LookedUp) -> None:
        """Begin with nothing.

        Args:
            settings: say how many bytes may be kept, and whether keys share them.
            looked_up: is told how many answers were found, and how many were not.
        """
        self._limit = settings.cache_bytes
        self._shared = settings.cache_shared
        self._looked_up = looked_up
        self._kept: OrderedDict[_Key, Output] = OrderedDict()
        self.held = 0

    def find(
        self, pictures: list[bytes], work: RateWork | AutoWork, caller: str | None
    ) -> list[Answer | None]:
        """Return the answers to pictures that are kept; None for each that is not.

        Args:
            pictures: their digests.
            work: what is asked for. Where the rate is open only the lowest one will do, which
                nothing but want of time makes higher.
            caller: whose key asks for it; None: the server is open to all.
        """
        exact = work.at(work.low)
        reason = "quality" if work.rate is None else "asked"
        found: list[Answer | None] = []
        for picture in pictures:
            key = self._key(picture, exact, caller)
            if (output := self._kept.get(key)) is None:
                found.append(None)
                continue
            self._kept.move_to_end(key)
            found.append(
                Answer(
                    output, exact, reason, decode=0, queue=0, inference=0, batch_size=0, cached=True
                )
            )
        hits = len(found) - found.count(None)
        self._looked_up(hits, len(found) - hits)
        return found

    def keep(self, picture: bytes, answer: Answer, caller: str | None) -> None:
        """Keep an answer of the engine, at the rate that ran."""
        assert isinstance(answer.work, RateWork)
        key = self._key(picture, answer.work, caller)
        if key in self._kept:
            return
        logits, features, source = answer.output
        # Copied out of the batch, all of which a part of it would hold.
        output = Output(
            logits.clone(), features.clone(), None if source is None else source.clone()
        )
        self._kept[key] = output
        self.held += _size(output)
        while self.held > self._limit:
            _, oldest = self._kept.popitem(last=False)
            self.held -= _size(oldest)

    def _key(self, picture: bytes, work: RateWork, caller: str | None) -> _Key:
        return _Key(
            None if self._shared else caller,
            picture,
            work.model.name,
            work.model.ladder.name,
            work.rate,
            work.compensate,
            work.trace,
            work.model.bank_digest,
        )


def digests(images: list[bytes] | list[bytearray]) -> list[bytes]:
    """Return what tells pictures apart."""
    return [hashlib.sha256(image).digest() for image in images]


def _size(output: Output) -> int:
    return AROUND + sum(each.nbytes for each in output if each is not None)
