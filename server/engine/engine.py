"""The batching engine: images in, outputs out, one worker thread which owns the forward.

Preparing (decoding) starts on arrival in a small pool, beside the forward, the most urgent image
first. What is prepared waits in the scheduler's queues, from which the worker takes batch after
batch. While anything is ready it waits only for images that are about to be. Whatever is late or
given up is dropped before inference, and its memory is free at once.

Knows nothing of HTTP, files or banks.
"""

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from itertools import count
from typing import Any, TypeVar

import torch
from torch import Tensor

from server.engine.job import Answer, Job, decoding_order
from server.engine.observer import Load, Observer
from server.engine.places import Places
from server.engine.pool import UrgentPool
from server.engine.scheduler import Batch, Scheduler
from server.engine.threads import begin_beside_forwards, set_torch_threads
from server.engine.turns import NORMAL
from server.engine.work import Runnable, Work
from server.errors import DeadlineError, QueueFullError, ShortDeadlineError, UnavailableError

logger = logging.getLogger(__name__)

T = TypeVar("T")

#: Seconds between two signs of life of an idle worker.
BEAT = 0.5


class Engine:
    """See the module. Use: `start`, then `submit_all` from any thread, at the end `stop`."""

    def __init__(
        self,
        max_batch: int = 32,
        max_queue: int = 256,
        max_wait: float = 0.0,
        slo: float = math.inf,
        decode_threads: int = 2,
        share: float = 0.0,
        keep_places: bool = False,
        observer: Observer | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Describe an engine; nothing runs yet.

        Args:
            max_batch: images in a forward.
            max_queue: images taken and not yet answered.
            max_wait: seconds that an idle worker lets a first image wait for company that was not
                even asked for. Under load batches fill while their predecessor runs.
            slo: seconds in which answers are wanted, which batches leave room for.
            decode_threads: threads that prepare images.
            share: of the time that each lower priority keeps while higher ones wait.
            keep_places: whether some places are kept for high priority.
            observer: is told what happens.
            clock: tells seconds; deadlines are in its time.
        """
        self.max_queue = max_queue
        self.max_wait = max_wait
        self.clock = clock
        self._pool: UrgentPool[Job] = UrgentPool(
            decode_threads, "decode", self._prepare, decoding_order, begin_beside_forwards
        )
        self._worker = threading.Thread(target=self._loop, name="forward", daemon=True)
        self._wake = threading.Condition()
        self._scheduler = Scheduler(max_batch, slo, share)
        self.observer = observer
        self._calls: deque[tuple[Future[Any], Callable[[], Any]]] = deque()
        self._numbers = count()
        self._places = Places(max_queue, keep_places)
        self._pace = 0.0
        self._decode = 0.0  # seconds that preparing an image takes as a rule
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
        self._pool.close()
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

    def load(self) -> Load:
        """Return what there is to do at this moment."""
        with self._wake:
            return Load(self._places.taken, self._scheduler.queued())

    def check_room(self, images: int = 1, priority: int = NORMAL) -> None:
        """Raise what `submit_all` would raise now, so that a body need not be read in vain.

        Raises:
            QueueFullError: if fewer than `images` places are free.
            TooLargeError: if there are not so many at all.
            UnavailableError: if the engine is stopping.
        """
        if self._closed:
            raise UnavailableError("the server is shutting down")
        self._places.check(images, priority, self._pace)

    def submit_all(
        self,
        work: Work,
        prepares: list[Callable[[], Tensor]],
        deadline: float,
        due: float | None = None,
        priority: int = NORMAL,
    ) -> list[Future[Answer]]:
        """Take images, all or none; each is answered, or fails, by itself.

        Args:
            work: what to do with each; batched with equal ones.
            prepares: make the images [3, H, W]; run in the pool. What one raises, its future
                raises. They are taken out of the list, so that their uploads are not kept by it.
            deadline: when the answers are of no more use, in the time of `clock`.
            due: when they should be there; default: at the deadline. Decides what is urgent.
            priority: of the images; the higher one goes first, whatever is due.

        Returns:
            The answers to come. Cancelling one gives its place free at once; a forward that
            runs already is not stopped. Raises DeadlineError if inference had too little time.

        Raises:
            DeadlineError: if the deadline has passed.
            QueueFullError: if not enough places are free, or what waits will take longer than
                there is.
            ShortDeadlineError: if the deadline is too near even for an idle engine.
            TooLargeError: if there are not so many places at all.
            UnavailableError: if the engine is stopping.
        """
        with self._wake:
            self._scheduler.asked(work, len(prepares), now := self.clock())
            self.check_room(len(prepares), priority)
            due = deadline if due is None else due
            if now >= deadline:
                raise DeadlineError("the deadline passed before the images were there")
            late = deadline > due
            allowed = (deadline - now) * self._scheduler.doubt(work, now)
            alone = self._scheduler.alone(work, len(prepares), late)
            if alone > allowed:
                what = "an image takes" if len(prepares) == 1 else f"{len(prepares)} images take"
                raise ShortDeadlineError(
                    f"{what} about {alone:.3g} s on this server even when nothing else waits, "
                    f"and {round(deadline - now, 3):g} s are left; allow more time or a higher rate"
                )
            wait = self._scheduler.wait(work, due, len(prepares), late, now, priority)
            if wait > allowed:
                raise QueueFullError(
                    f"what waits will take {wait:.3g} s, and the answer is wanted in "
                    f"{deadline - now:.3g} s",
                    retry_after=now + wait - deadline,
                )
            jobs: list[Future[Answer]] = []
            while prepares:
                self._places.take(priority)
                number = next(self._numbers)
                job = Job(work, prepares.pop(0), deadline, due, number, now, priority)
                self._scheduler.arrived(job, now)
                job.add_done_callback(self._leave)
                self._pool.add(job)
                jobs.append(job)
        return jobs

    def submit_again(
        self, work: Work, image: Tensor, deadline: float, due: float | None, priority: int
    ) -> Future[Answer]:
        """Take an image that has run already, for other work; being let in, it needs no free place.

        Args:
            work: what to do with it this time.
            image: [3, H, W], prepared.
            deadline, due, priority: as of `submit_all`, and the same as before.

        Raises:
            DeadlineError: if there is not enough time left for it.
            UnavailableError: if the engine has stopped.
        """
        with self._wake:
            if self._drained and threading.current_thread() is not self._worker:
                raise UnavailableError("the engine is not running")
            now = self.clock()
            due = deadline if due is None else due
            wait = self._scheduler.wait(work, due, 1, deadline > due, now, priority)
            if now + wait > deadline:
                raise DeadlineError(
                    f"another run takes {wait:.3g} s, and {deadline - now:.3g} s are left"
                )
            self._places.take(priority)
            job = Job(work, None, deadline, due, next(self._numbers), now, priority)
            job.again = True
            self._scheduler.arrived(job, now)
            job.hold(image)
            job.add_done_callback(self._leave)
            self._scheduler.add(job)
            self._wake.notify()
        return job

    def call(self, function: Callable[[], T]) -> Future[T]:
        """Run `function` on the worker, between two batches, as a forward would run there."""
        future: Future[T] = Future()
        with self._wake:
            if self._drained or not self._worker.is_alive():
                raise UnavailableError("the engine is not running")
            self._calls.append((future, function))
            self._wake.notify()
        return future

    def _prepare(self, job: Job) -> None:
        prepare, job.prepare = job.prepare, None
        if prepare is None or job.done() or self._expire(job):
            return
        job.began = self.clock()
        try:
            job.hold(prepare())
        except Exception as error:
            if job.fail(error) and self.observer:
                self.observer.failed(job.work, "decode")
            return
        job.decode = self.clock() - job.began
        if self.observer:
            self.observer.decoded(job.work, job.decode)
        with self._wake:
            usual = self._decode or job.decode
            self._decode = 0.9 * usual + 0.1 * min(job.decode, 2 * usual)
            # Whoever cancels from here on takes the job out of its queue again.
            if not job.done():
                self._scheduler.add(job)
                self._wake.notify()

    def _leave(self, job: Future[Answer]) -> None:
        assert isinstance(job, Job)
        with self._wake:
            self._places.leave(job.priority)
            self._scheduler.discard(job)
        self._pool.discard(job)
        job.prepare = None
        if job.cancelled() and self.observer:
            if self.clock() < job.deadline:
                self.observer.cancelled(job.work)
            else:  # whoever waits for an answer gives it up when its time is over
                self._late(job)

    def _loop(self) -> None:
        set_torch_threads(1)  # work takes more where it has use for them
        while not (self._drained and not self._scheduler and not self._calls):
            self._beat = self.clock()
            self._go_on()

    def _go_on(self) -> None:
        """Do what is next.

        Not in the loop itself: what waits for the next batch must not keep the last one's images.
        """
        jobs: Sequence[Job] = []
        try:
            self._call_next()
            if (batch := self._take()) is None:
                return
            jobs = batch.jobs
            if ready := [job for job in jobs if not self._expire(job) and job.begin()]:
                self._run(batch.work, batch.reason, ready)
        except Exception as error:  # a bug of ours must not end the service of everyone
            logger.exception("the engine's worker goes on after an error of its own")
            for job in jobs:
                with suppress(InvalidStateError):
                    job.set_exception(error)

    def _call_next(self) -> None:
        if not self._calls:
            return
        future, function = self._calls.popleft()
        if future.set_running_or_notify_cancel():
            try:
                future.set_result(function())
            except Exception as error:
                future.set_exception(error)

    def _take(self) -> Batch | None:
        """Return the next batch; None after a while without one, or before a call."""
        with self._wake:
            if not self._scheduler:
                self._wake.wait_for(
                    lambda: self._scheduler or self._calls or self._drained, timeout=BEAT
                )
                self._wait_for_company()
            self._wait_for_prepared()
            now = self.clock()
            for job in self._scheduler.give_up(now):
                self._miss(job)
            return self._scheduler.take(now)

    def _wait_for_company(self) -> None:
        """Let the first images of an idle worker wait for more, as long as all can spare it."""
        until = self.clock() + self.max_wait
        while self._scheduler and not self._drained:
            now = self.clock()
            patience = min(until - now, self._scheduler.patience(now))
            if patience <= 0:
                return
            self._wake.wait(patience)

    def _wait_for_prepared(self) -> None:
        """Let a batch wait for images that are being prepared, as long as they come one by one."""
        while not self._calls:
            patience = self._scheduler.gather(self.clock(), self._decode)
            if patience <= 0:
                return
            self._wake.wait(patience)

    def _run(self, work: Runnable, reason: str, jobs: Sequence[Job]) -> None:
        """Answer jobs that have begun; if the batch fails, each by itself."""
        started = self.clock()
        try:
            images = torch.stack([job.image for job in jobs])
            with torch.inference_mode():
                # Also tells a forward that returned too few.
                answers = list(zip(jobs, work(images), strict=True))
        except Exception as error:
            if len(jobs) == 1:
                jobs[0].set_exception(error)
                if self.observer:
                    self.observer.failed(work, "inference")
                return
            logger.warning("a batch of %d failed (%r): retrying one by one", len(jobs), error)
            for job in jobs:
                self._run(work, reason, [job])
            return
        spent = self.clock() - started
        self._scheduler.ran(work, len(jobs), spent)
        pace = spent / len(jobs)
        self._pace = 0.8 * self._pace + 0.2 * pace if self._pace else pace
        queued = [started - job.arrived - job.decode for job in jobs]
        for (job, output), waited in zip(answers, queued, strict=True):
            job.set_result(
                Answer(
                    output=output,
                    work=work,
                    reason=reason,
                    decode=job.decode,
                    queue=waited,
                    inference=spent,
                    batch_size=len(jobs),
                )
            )
        if self.observer:
            self.observer.ran(work, reason, images.shape, spent, queued)
            for job in jobs:
                if started + spent > job.deadline:
                    self._late(job)

    def _expire(self, job: Job) -> bool:
        """Fail a job that has not begun and is past its deadline; return whether it was."""
        if late := self.clock() >= job.deadline:
            self._miss(job)
        return late

    def _miss(self, job: Job) -> None:
        error = DeadlineError("too little time was left for inference before the deadline")
        if job.fail(error):
            self._late(job)

    def _late(self, job: Job) -> None:
        """Tell of an image that is late, unless the answer of an earlier run stands for it."""
        if self.observer and not job.again:
            self.observer.missed(job.work, job.stage)
