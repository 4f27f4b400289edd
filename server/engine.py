"""The batching engine: images in, logits out, one worker thread which owns the forward.

Preparing (decoding) starts on arrival in a small pool, beside the forward. What is prepared
waits in one queue per kind of work (model, rate, compensate). The worker always takes the queue
whose head is most urgent, by deadline, then by age, and fills a batch from it. It never
waits while anything is ready. Whatever is late or given up is dropped before inference.

Knows nothing of HTTP, files or banks.
"""

import logging
import threading
import time
from bisect import insort
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from typing import Protocol

import torch
from torch import Tensor

from server.errors import DeadlineError, QueueFullError, UnavailableError

logger = logging.getLogger(__name__)

#: Seconds between two signs of life of an idle worker.
BEAT = 0.5


class Work(Protocol):
    """What requests of one batch share; equal works run together."""

    def __hash__(self) -> int:
        """Hash what the work depends on."""
        ...

    def __call__(self, images: Tensor) -> Tensor:
        """Run images [B, 3, H, W] to logits [B, C]."""
        ...


@dataclass(frozen=True)
class Answer:
    """What the engine says about one image.

    Attributes:
        logits: [C] fp32 on the CPU.
        decode: seconds that preparing the image took.
        queue: seconds that it waited, for the pool and for its batch.
        inference: seconds that its batch ran.
        batch_size: images in that batch.
    """

    logits: Tensor
    decode: float
    queue: float
    inference: float
    batch_size: int


class _Job(Future[Answer]):
    """The future that a caller gets, with what it takes to fulfil it.

    One object, so that it is freed with its image as soon as the last one lets go: a job and
    a future that know each other would wait for the garbage collector.
    """

    # Set once the image is prepared.
    image: Tensor
    decode: float

    def __init__(self, work: Work, deadline: float, number: int, arrived: float) -> None:
        super().__init__()
        self.work = work
        self.urgency = (deadline, number)
        self.deadline = deadline
        self.arrived = arrived


class Engine:
    """See the module. Use: `start`, then `submit` from any thread, at the end `stop`."""

    def __init__(
        self,
        max_batch: int = 32,
        max_queue: int = 256,
        max_wait: float = 0.0,
        decode_threads: int = 2,
        threads: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Describe an engine; nothing runs yet.

        Args:
            max_batch: images in a forward.
            max_queue: images taken and not yet answered.
            max_wait: seconds that an idle worker lets a first image wait for company. 0 is
                work-conserving: under load batches fill while their predecessor runs.
            decode_threads: threads that prepare images.
            threads: torch threads of the forward; None: torch's own choice.
            clock: tells seconds; deadlines are in its time.
        """
        self.max_batch = max_batch
        self.max_queue = max_queue
        self.max_wait = max_wait
        self.clock = clock
        # Asked for here: a thread's default later is whatever another thread set last.
        self._threads = threads or torch.get_num_threads()
        self._pool = ThreadPoolExecutor(decode_threads, "decode", _set_torch_threads, (1,))
        self._worker = threading.Thread(target=self._loop, name="forward", daemon=True)
        self._wake = threading.Condition()
        self._queues: dict[Work, list[_Job]] = {}
        self._numbers = count()
        self._taken = 0
        self._pace = 0.0
        self._beat = clock()
        self._closed = False
        self._drained = False

    def start(self) -> None:
        """Start the worker."""
        self._worker.start()

    def stop(self) -> None:
        """Refuse what comes, answer what has come, end the threads."""
        with self._wake:
            self._closed = True
        self._pool.shutdown()
        with self._wake:
            self._drained = True
            self._wake.notify()
        self._worker.join()

    @property
    def running(self) -> bool:
        """Whether the worker runs and new images are taken."""
        return self._worker.is_alive() and not self._closed

    @property
    def silence(self) -> float:
        """Seconds since the worker's last sign of life; grows while a batch runs."""
        return self.clock() - self._beat

    def check_room(self) -> None:
        """Raise what `submit` would raise now, so that a body need not be read in vain.

        Raises:
            QueueFullError: if as many images as may wait are waiting.
            UnavailableError: if the engine is stopping.
        """
        if self._closed:
            raise UnavailableError("the server is shutting down")
        if self._taken >= self.max_queue:
            raise QueueFullError(
                f"all {self.max_queue} places in the queue are taken",
                retry_after=self._taken * self._pace,
            )

    def submit(self, work: Work, prepare: Callable[[], Tensor], deadline: float) -> Future[Answer]:
        """Take one image.

        Args:
            work: what to do with it; batched with equal ones.
            prepare: makes the image [3, H, W]; runs in the pool. What it raises, the future raises.
            deadline: when the answer is of no more use, in the time of `clock`.

        Returns:
            The answer to come. Cancelling it gives the place free at once; a forward that
            runs already is not stopped. Raises DeadlineError if inference did not start in time.

        Raises:
            QueueFullError, UnavailableError: see `check_room`.
        """
        with self._wake:
            self.check_room()
            self._taken += 1
            job = _Job(work, deadline, next(self._numbers), arrived=self.clock())
            job.add_done_callback(self._leave)
            # Not kept in the job: what is to be prepared may be large and goes once it is.
            self._pool.submit(self._prepare, job, prepare)
        return job

    def _prepare(self, job: _Job, prepare: Callable[[], Tensor]) -> None:
        if job.done() or self._expire(job):
            return
        started = self.clock()
        try:
            job.image = prepare()
        except Exception as error:
            _fail(job, error)
            return
        job.decode = self.clock() - started
        with self._wake:
            # Whoever cancels from here on takes the job out of its queue again.
            if not job.done():
                insort(self._queues.setdefault(job.work, []), job, key=_urgency)
                self._wake.notify()

    def _leave(self, job: Future[Answer]) -> None:
        assert isinstance(job, _Job)
        with self._wake:
            self._taken -= 1
            queue = self._queues.get(job.work, [])
            if job in queue:
                queue.remove(job)
                if not queue:
                    del self._queues[job.work]

    def _loop(self) -> None:
        _set_torch_threads(self._threads)
        while not (self._drained and not self._queues):
            self._beat = self.clock()
            jobs: list[_Job] = []
            try:
                jobs = self._take()
                batch = [
                    job
                    for job in jobs
                    if not self._expire(job) and job.set_running_or_notify_cancel()
                ]
                if batch:
                    self._run(batch)
            except Exception as error:  # a bug of ours must not end the service of everyone
                logger.exception("the engine's worker goes on after an error of its own")
                for job in jobs:
                    with suppress(InvalidStateError):
                        job.set_exception(error)

    def _take(self) -> list[_Job]:
        """Return the jobs of the next batch; none after a while without work."""
        with self._wake:
            if not self._queues:
                self._wake.wait_for(lambda: self._queues or self._drained, timeout=BEAT)
                if self._queues and self.max_wait:
                    self._wake.wait_for(self._batch_is_full, timeout=self.max_wait)
            if not self._queues:
                return []
            work, queue = min(self._queues.items(), key=lambda item: item[1][0].urgency)
            batch, rest = queue[: self.max_batch], queue[self.max_batch :]
            if rest:
                self._queues[work] = rest
            else:
                del self._queues[work]
            return batch

    def _batch_is_full(self) -> bool:
        return self._drained or any(len(q) >= self.max_batch for q in self._queues.values())

    def _run(self, jobs: Sequence[_Job]) -> None:
        """Answer jobs that have begun; if the batch fails, each by itself."""
        started = self.clock()
        try:
            images = torch.stack([job.image for job in jobs])
            with torch.inference_mode():
                logits = jobs[0].work(images).float().cpu()
            # Also tells a forward that returned too few.
            answers = list(zip(jobs, logits, strict=True))
        except Exception as error:
            if len(jobs) == 1:
                jobs[0].set_exception(error)
                return
            logger.warning("a batch of %d failed (%r): retrying one by one", len(jobs), error)
            for job in jobs:
                self._run([job])
            return
        spent = self.clock() - started
        pace = spent / len(jobs)
        self._pace = 0.8 * self._pace + 0.2 * pace if self._pace else pace
        for job, row in answers:
            job.set_result(
                Answer(
                    logits=row,
                    decode=job.decode,
                    queue=started - job.arrived - job.decode,
                    inference=spent,
                    batch_size=len(jobs),
                )
            )

    def _expire(self, job: _Job) -> bool:
        """Fail a job that has not begun and is past its deadline; whether it was."""
        if self.clock() < job.deadline:
            return False
        _fail(job, DeadlineError("the deadline passed before inference began"))
        return True


def _urgency(job: _Job) -> tuple[float, int]:
    return job.urgency


def _fail(job: _Job, error: Exception) -> None:
    """Fail a job that has not begun, unless it was cancelled."""
    if job.set_running_or_notify_cancel():
        job.set_exception(error)


def _set_torch_threads(threads: int) -> None:
    # Asked first: a thread that was never asked takes over what any other thread set last.
    torch.get_num_threads()
    torch.set_num_threads(threads)
