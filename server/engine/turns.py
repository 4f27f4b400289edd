"""Whose turn it is where some images matter more than others: priorities, and what low ones keep.

The highest priority that waits runs first. Lower ones keep a share of the time, so that they are
slow at worst and never stand still. Knows nothing of clocks: it is told how long batches take.
"""

from collections.abc import Collection

#: Priorities by their names, the highest first; as numbers they are their places here.
PRIORITIES = ("high", "normal", "low")
HIGH, NORMAL, LOW = range(len(PRIORITIES))

#: Seconds of a batch whose time is not known yet: any will do.
UNKNOWN = 1e-3


class Turns:
    """See the module."""

    def __init__(self, share: float) -> None:
        """Begin with nobody owed anything.

        Args:
            share: of the time that each lower priority keeps while higher ones wait, in [0, 1).
        """
        self._share = share
        # Seconds that are owed to each lower priority; below 0, that it had beyond its share.
        self._owed = dict.fromkeys((NORMAL, LOW), 0.0)

    def next(self, waiting: Collection[int]) -> int:
        """Return the priority that runs next, of those that wait."""
        first = min(waiting)
        owed = {p: s for p, s in self._owed.items() if p in waiting and p > first and s > 0}
        return max(owed, key=owed.__getitem__, default=first)

    def ran(self, priority: int, seconds: float, waiting: Collection[int]) -> None:
        """Take note of a batch.

        Args:
            priority: whose turn it was.
            seconds: that it takes.
            waiting: priorities that waited before it, its own included.
        """
        seconds = seconds or UNKNOWN
        first = min(waiting)
        for each in self._owed:
            if each > first:
                self._owed[each] += seconds * (self._share - (each == priority))
            if each <= first or each not in waiting:  # what is not asked for is not saved up
                self._owed[each] = min(self._owed[each], 0.0)
