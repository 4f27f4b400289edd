"""Threads that prepare images, the most urgent one first.

Knows nothing of images: what is a task and how urgent it is are arguments.
"""

import threading
from bisect import insort
from collections.abc import Callable
from typing import Any, Generic, TypeVar

Task = TypeVar("Task")


class UrgentPool(Generic[Task]):
    """See the module.

    An executor of the standard library goes by arrival, and keeps what is given up until its turn.
    """

    def __init__(
        self,
        threads: int,
        name: str,
        run: Callable[[Task], None],
        urgency: Callable[[Task], Any],
        begin: Callable[[], None],
    ) -> None:
        """Describe a pool; its threads start with its first task.

        Args:
            threads: how many tasks run at once.
            name: of the threads.
            run: runs a task; must not raise.
            urgency: what tasks are sorted by, the most urgent first.
            begin: is called by each thread as it starts.
        """
        self._run = run
        self._urgency = urgency
        self._begin = begin
        self._threads = [
            threading.Thread(target=self._loop, name=f"{name}-{i}", daemon=True)
            for i in range(threads)
        ]
        self._waiting: list[Task] = []
        self._change = threading.Condition()
        self._started = False
        self._closed = False

    def add(self, task: Task) -> None:
        """Run a task as soon as no more urgent one waits for a thread."""
        with self._change:
            assert not self._closed
            if not self._started:
                self._started = True
                for thread in self._threads:
                    thread.start()
            insort(self._waiting, task, key=self._urgency)
            self._change.notify()

    def discard(self, task: Task) -> None:
        """Let go of a task, unless it runs already."""
        with self._change:
            if task in self._waiting:
                self._waiting.remove(task)

    def close(self) -> None:
        """Run what waits, take nothing more, and end the threads."""
        with self._change:
            self._closed = True
            self._change.notify_all()
        if self._started:
            for thread in self._threads:
                thread.join()

    def _loop(self) -> None:
        self._begin()
        while (task := self._next()) is not None:
            self._run(task)
            del task  # what waits for the next one must not keep the last one's image

    def _next(self) -> Task | None:
        with self._change:
            self._change.wait_for(lambda: self._waiting or self._closed)
            return self._waiting.pop(0) if self._waiting else None
