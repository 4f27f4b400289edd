"""The places of images that are taken and not yet answered, and who may have them."""

from collections import Counter

from server.engine.turns import HIGH, LOW
from server.errors import QueueFullError, TooLargeError

#: One in so many places is kept for high priority, if there is any.
KEPT = 8


class Places:
    """See the module. Low priority never has more than half of them."""

    def __init__(self, limit: int, keep: bool) -> None:
        """Begin with all of them free.

        Args:
            limit: how many there are.
            keep: whether some are kept for high priority.
        """
        self.limit = limit
        self._kept = limit // KEPT if keep else 0
        self._taken: Counter[int] = Counter()

    @property
    def taken(self) -> int:
        """How many are taken."""
        return self._taken.total()

    def check(self, images: int, priority: int, pace: float) -> None:
        """Check that so many may be taken.

        Args:
            images: how many.
            priority: whose.
            pace: seconds after which one place comes free, about.

        Raises:
            QueueFullError: if they may not now.
            TooLargeError: if they never may.
        """
        limit = self.limit if priority == HIGH else self.limit - self._kept
        half = (self.limit + 1) // 2
        most = half if priority == LOW else limit
        if images > most:
            raise TooLargeError(
                f"{images} images are more than the {most} places that the queue has for this "
                "priority: send fewer at once"
            )
        if (taken := self.taken) + images > limit:
            kept = f" ({self._kept} more are kept for high priority)" if limit < self.limit else ""
            raise QueueFullError(
                f"{taken} of {limit} places in the queue are taken{kept}; {images} would be needed",
                retry_after=taken * pace,
            )
        if priority == LOW and (low := self._taken[LOW]) + images > half:
            raise QueueFullError(
                f"{low} of the {half} places in the queue for low priority are taken; {images} "
                "would be needed",
                retry_after=low * pace,
            )

    def take(self, priority: int) -> None:
        """Take one."""
        self._taken[priority] += 1

    def leave(self, priority: int) -> None:
        """Give one back."""
        self._taken[priority] -= 1
