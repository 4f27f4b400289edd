"""Which processors there are for this process, and how many torch threads a forward gets.

OpenMP's threads wait awake for their next operation, of which a forward has hundreds. Alone that
is the fastest way for a few images. Beside a busy program they wait for a thread that has lost its
core, while they keep it from getting one: then a forward on one thread takes half of the time. Many
images are shared out to threads that do not wait for each other.

Reference: docs/decisions/0008-fair-beside-neighbours.md has the figures.
"""

import math
import os
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor
from typing_extensions import Self

T = TypeVar("T")

#: Share of the time of its cores that the process must have during a forward, to be alone.
ALONE = 0.75
#: How much the last forward weighs in that share: one that was interrupted says little.
WEIGHT = 0.3
#: Seconds on one thread before all are tried again, at first and at most; each try in vain
#: doubles them.
PAUSE, LONGEST_PAUSE = 1.0, 16.0
#: By how much threads that work beside forwards are nicer: they get a third of what a forward does.
NICE = 5
#: Images that each thread must get for a batch to be shared out: fewer take longer than together.
SHARE = 4


def available_processors(root: Path = Path("/")) -> int:
    """Return how many processors this process may keep busy.

    Those of its affinity mask, and no more than the quota of its control groups, as container
    engines set it, rounded up.

    Args:
        root: where `proc` and `sys` are.
    """
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, min([allowed or 1, *map(math.ceil, _quotas(root))]))


def _quotas(root: Path) -> list[float]:
    """Return the processors that each control group of this process allows; none: no limit."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    quotas = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        v1 = "cpu" in controllers.split(",")
        if controllers and not v1:
            continue
        top = root / "sys/fs/cgroup" / ("cpu" if v1 else "")
        group = top / path.lstrip("/")
        for folder in (group, *group.parents):
            if not folder.is_relative_to(top):
                break
            if quota := _quota(folder, v1):
                quotas.append(quota)
    return quotas


def _quota(folder: Path, v1: bool) -> float | None:
    names = ("cpu.cfs_quota_us", "cpu.cfs_period_us") if v1 else ("cpu.max",)
    try:
        quota, period = " ".join((folder / name).read_text() for name in names).split()
        return int(quota) / int(period) if int(quota) > 0 else None
    except (OSError, ValueError):  # none there, or `max`
        return None


def set_torch_threads(threads: int) -> None:
    """Set how many torch threads the calling thread gets, and one for threads that are to come."""
    # Asked first: a thread that was never asked takes over what any other thread set last.
    torch.get_num_threads()
    torch.set_num_threads(threads)
    if threads > 1:
        # What was set last is where new threads begin.
        last = threading.Thread(target=set_torch_threads, args=(1,))
        last.start()
        last.join()


def _change_torch_threads(threads: int) -> None:
    """Set how many torch threads the calling thread gets, unless it has as many.

    To set several takes a third of a millisecond, which a forward of one image should not take.
    """
    if torch.get_num_threads() != threads:
        set_torch_threads(threads)


def begin_beside_forwards() -> None:
    """Make the calling thread one for small work beside forwards, such as decoding.

    It takes one torch thread, and a smaller share of a core that a forward wants: the threads of
    a forward wait for each other, so for one that is held up all are.
    """
    set_torch_threads(1)
    if sys.platform != "linux":  # elsewhere only whole processes have a niceness
        return
    with suppress(OSError):  # a sandbox may forbid it, and then they are as nice as forwards
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), os.nice(0) + NICE)


class Team:
    """The torch threads of a forward: all while it is alone, one beside busy programs.

    Use: `run`, always on the same thread, which keeps as many as its last forward had.
    """

    def __init__(
        self,
        threads: int,
        clock: Callable[[], float] = time.perf_counter,
        spent: Callable[[], float] = time.process_time,
    ) -> None:
        """Begin alone.

        Args:
            threads: all.
            clock: tells seconds.
            spent: tells the seconds that threads of this process have had a core for, together:
                its own decoders, which take turns with a forward, are no neighbours.
        """
        self.threads = threads
        self._clock = clock
        self._spent = spent
        self._share = 1.0
        self._pause = PAUSE
        self._until = -math.inf  # when all threads may be tried again
        self._sharers = ThreadPoolExecutor(threads, "share", set_torch_threads, (1,))

    def run(self, forward: Callable[[Tensor], T], images: Tensor) -> list[T]:
        """Return what `forward` makes of images [B, 3, H, W].

        Where they are many, each thread runs a share of them: the list has what it makes of each
        share, in their order. Shares differ by one image at most.
        """
        if self.threads > 1 and len(images) >= SHARE * self.threads:
            # Or those that wait awake after the copy of a batch would take cores from the shares.
            _change_torch_threads(1)
            shares = images.tensor_split(self.threads)
            running = [self._sharers.submit(_run, forward, share) for share in shares]
            wait(running)  # if one fails the others must not run on beside what comes next
            return [share.result() for share in running]
        with self:
            return [forward(images)]

    @property
    def size(self) -> int:
        """How many threads the next forward gets."""
        return self.threads if self._clock() >= self._until else 1

    def __enter__(self) -> Self:
        self._size = self.size
        if self.threads > 1:
            _change_torch_threads(self._size)
        self._began = self._clock(), self._spent()
        return self

    def __exit__(self, *_: object) -> None:
        wall, spent = self._clock() - self._began[0], self._spent() - self._began[1]
        if self._size > 1 and wall > 0:
            self._take_note(spent / (wall * self._size))

    def _take_note(self, share: float) -> None:
        """Judge by the share of its cores' time that the process had during a forward."""
        self._share += WEIGHT * (share - self._share)
        if self._share < ALONE:
            self._until = self._clock() + self._pause
            self._share = 1.0  # the next try is judged by itself
            self._pause = min(2 * self._pause, LONGEST_PAUSE)
        elif share >= ALONE:
            self._pause = PAUSE


def _run(forward: Callable[[Tensor], T], share: Tensor) -> T:
    with torch.inference_mode():  # which is a thread's own
        return forward(share)
