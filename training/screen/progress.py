"""How far a job has come: a bar on a terminal, a plain line now and then in a log file.

Only the first of several processes says anything.
"""

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol, TypeVar

from tqdm import tqdm

#: Seconds between two lines in a log.
_LOG_EVERY = 30
#: From so many on, amounts are shown as k, M, G: multiply-adds, not steps.
_SCALED = 10**6

#: Set in a process that does a part of a job beside others.
_silenced = threading.Event()
T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


class Counted(Protocol[T_co]):
    """Items of a known number: a list, the batches of a DataLoader."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[T_co]: ...


def silence() -> None:
    """Say nothing in this process from now on: it is one of several that do parts of a job."""
    _silenced.set()


def shown() -> bool:
    """Return whether this process says anything."""
    # torchrun and accelerate launch number their processes so.
    return not _silenced.is_set() and os.environ.get("RANK", "0") == "0"


def say(text: str) -> None:
    """Write a line to stderr, above the bars that are there."""
    if shown():
        tqdm.write(text, file=sys.stderr)
        sys.stderr.flush()


def duration(seconds: float) -> str:
    """Return a span of time in words: 45 s, 12 min, 2 h 05 min."""
    minutes = round(seconds / 60)
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"


class Progress:
    """How far one thing has come."""

    def __init__(
        self,
        what: str,
        total: int,
        unit: str,
        done: int = 0,
        passing: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Show that it has begun.

        Args:
            what: is done, in a word or a few.
            total: of its units.
            unit: what is counted, in the singular.
            done: so many were done before.
            passing: part of something else: the bar goes when it is done, and a log hears of it
                only if it takes long.
            clock: tells the seconds.
        """
        self.what, self.total, self.done = what, total, done
        self._before, self._clock = done, clock
        self._began = self._said = clock()
        terminal = sys.stderr.isatty()
        self._logs = shown() and not terminal
        self._bar: Any = tqdm(
            desc=what, total=total, initial=done, unit=unit, unit_scale=total >= _SCALED,
            leave=not passing, dynamic_ncols=True, disable=not (shown() and terminal),
            file=sys.stderr,
        )  # fmt: skip
        if self._logs and not passing:
            say(f"{what} ...")

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def update(self, count: int = 1, note: str = "") -> None:
        """Count some as done.

        Args:
            count: so many units.
            note: a figure to show beside, such as the loss; empty: none.
        """
        self.done += count
        self._bar.set_postfix_str(note, refresh=False)
        self._bar.update(count)
        if self._logs and self._clock() - self._said >= _LOG_EVERY:
            self._said = self._clock()
            share = f"{self.what}: {100 * self.done / self.total:.0f} %"
            if self.total < _SCALED:
                share += f" ({self.done:,} of {self.total:,})"
            say("; ".join(part for part in (share, note, self.left()) if part))

    def note(self, text: str) -> None:
        """Show at once what goes on between two units; a log does not hear of it."""
        self._bar.set_postfix_str(text)

    def left(self) -> str:
        """Return how long the rest takes, if it goes on as it has; empty before the first unit."""
        done = self.done - self._before
        if not done or self.done >= self.total:
            return ""
        seconds = (self._clock() - self._began) / done * (self.total - self.done)
        return f"{duration(seconds)} left"


def following(items: Counted[T], what: str, unit: str) -> Iterator[T]:
    """Yield the items of a passing job, and show how many are done."""
    with Progress(what, len(items), unit, passing=True) as progress:
        for item in items:
            yield item
            progress.update()
