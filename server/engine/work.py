"""What the engine asks of work and of the images that wait for it."""

from collections.abc import Sequence
from typing import Any, Protocol

from server.engine.rates import Controller


class Work(Protocol):
    """What images of one batch share; equal works run together."""

    @property
    def rate(self) -> int | None:
        """The rate that was asked for; None: one in `low`..`high`, chosen for each batch."""
        ...

    @property
    def low(self) -> int:
        """The lowest rate allowed."""
        ...

    @property
    def high(self) -> int:
        """The highest rate allowed."""
        ...

    @property
    def controller(self) -> Controller:
        """The controller of the model, which knows how long its batches take."""
        ...

    def at(self, rate: int) -> "Runnable":
        """Return the same work at one of these rates."""
        ...

    def __hash__(self) -> int:
        """Hash what the work depends on."""
        ...


class Runnable(Work, Protocol):
    """Work at an exact rate."""

    @property
    def rate(self) -> int:
        """The rate that it runs at."""
        ...

    def __call__(self, images: Any) -> Sequence[Any]:
        """Run images [B, 3, H, W] to one output each."""
        ...


class Waiting(Protocol):
    """An image that waits: its work, when it came and is due, its number, priority and shape.

    After its deadline it is of no more use. Its preparation began some time, or did not yet (inf).
    """

    work: Work
    arrived: float
    began: float
    due: float
    deadline: float
    number: int
    priority: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the image; only images of one shape run together."""
        ...
