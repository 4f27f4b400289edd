"""One image on its way through the engine, and what the engine says of it in the end."""

import math
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from server.engine.work import Runnable, Work

#: By its priority, when an image is decoded as if it were due: this much of its time from its
#: arrival. No priority waits for ever, as it might if another went first always.
HASTE = (0.25, 1, 4)


@dataclass(frozen=True)
class Answer:
    """What the engine says about one image.

    Attributes:
        output: what the work returned for it.
        work: what ran; at the rate that was chosen, where none was asked for.
        reason: of that rate: `asked`, or one of the controller's.
        decode: seconds that preparing the image took.
        queue: seconds that it waited, for the pool and for its batch.
        inference: seconds that its batch ran.
        batch_size: images in that batch.
        before: the answers of the runs before this one, of an image that ran again.
        cached: whether it was kept from before, and nothing ran.
    """

    output: Any
    work: Runnable
    reason: str
    decode: float
    queue: float
    inference: float
    batch_size: int
    before: tuple["Answer", ...] = ()
    cached: bool = False


class Job(Future[Answer]):
    """The future that a caller gets, with what it takes to fulfil it.

    One object, so that it is freed with its image as soon as the last one lets go: a job and
    a future that know each other would wait for the garbage collector.
    """

    # Set once the image is prepared; `began` when that begins.
    image: Tensor
    shape: tuple[int, ...]
    began = math.inf
    decode = 0.0
    # Where it is on its way: `decode`, `queue` or `inference`.
    stage = "decode"
    # Whether it ran before, and has an answer that stands if this run is late.
    again = False

    def __init__(
        self,
        work: Work,
        prepare: Callable[[], Tensor] | None,
        deadline: float,
        due: float,
        number: int,
        arrived: float,
        priority: int,
    ) -> None:
        super().__init__()
        self.work = work
        # None once it runs, or is given up: it may hold a whole upload.
        self.prepare = prepare
        self.deadline = deadline
        self.due = due
        self.number = number
        self.arrived = arrived
        self.priority = priority

    def hold(self, image: Tensor) -> None:
        """Take the prepared image."""
        self.image, self.shape = image, tuple(image.shape)
        self.stage = "queue"

    def begin(self) -> bool:
        """Begin its forward, unless it was given up; return whether it began."""
        if not self.set_running_or_notify_cancel():
            return False
        self.stage = "inference"
        return True

    def fail(self, error: Exception) -> bool:
        """Fail an image that has not begun, unless it was given up; return whether it failed."""
        if not self.set_running_or_notify_cancel():
            return False
        self.set_exception(error)
        return True


def decoding_order(job: Job) -> tuple[float, int]:
    """Return what images are decoded by, the most urgent first."""
    return job.arrived + HASTE[job.priority] * (job.due - job.arrived), job.number
