"""How many pixels a process decodes at a time.

A small file may hold a large picture: what one may have is bounded by the settings, and what
several have together by a budget, for which decoding threads wait in turn.
"""

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Condition


class PixelBudget:
    """Pixels that pictures share while they are in memory; safe for threads."""

    def __init__(self) -> None:
        self._changed = Condition()
        self._held = 0
        self._waiting: deque[object] = deque()

    @contextmanager
    def hold(self, pixels: int, limit: int) -> Iterator[None]:
        """Hold pixels of a picture, once no more than `limit` are held with them.

        First come, first served, so that small pictures do not keep a large one waiting for ever.
        One of more than `limit` pixels is decoded by itself.
        """
        turn = object()
        with self._changed:
            self._waiting.append(turn)
            try:
                self._changed.wait_for(
                    lambda: (
                        self._waiting[0] is turn
                        and (self._held == 0 or self._held + pixels <= limit)
                    )
                )
                self._held += pixels
            finally:
                self._waiting.remove(turn)
                self._changed.notify_all()  # the next in turn may have room, too
        try:
            yield
        finally:
            with self._changed:
                self._held -= pixels
                self._changed.notify_all()


#: Of all that this process decodes.
DECODING = PixelBudget()
