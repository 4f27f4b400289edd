"""What an engine tells of itself while it runs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from server.engine.work import Runnable, Work


@dataclass(frozen=True)
class Load:
    """What an engine has to do at a moment.

    Attributes:
        taken: images that were taken and are not yet answered.
        queued: of these, those that are prepared and wait, by their work.
    """

    taken: int
    queued: Mapping[Work, int]


class Observer(Protocol):
    """Is told what happens, from the engine's threads: it must be quick and never raise."""

    def decoded(self, work: Work, seconds: float) -> None:
        """Take note of an image that was prepared."""
        ...

    def ran(
        self,
        work: Runnable,
        reason: str,
        shape: tuple[int, ...],
        seconds: float,
        queued: Sequence[float],
    ) -> None:
        """Take note of a batch [B, 3, H, W], and of the seconds that each image had waited."""
        ...

    def failed(self, work: Work, stage: str) -> None:
        """Take note of an image whose `decode` or `inference` raised."""
        ...

    def missed(self, work: Work, stage: str) -> None:
        """Take note of an image that is late: before `decode`, in `queue`, after `inference`."""
        ...

    def cancelled(self, work: Work) -> None:
        """Take note of an image that was given up."""
        ...

    def passed(self, works: Sequence[Runnable], reason: str) -> None:
        """Take note of an image that is answered after one run or several, one after the other."""
        ...
