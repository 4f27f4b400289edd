"""From a rate to a plan: how many tokens every block removes, known before any image.

Does not look at images or weights: token counts depend on the rate alone, so that
buffers, graphs and batch shapes can be made ahead.

Reference: Token Merging, arXiv:2210.09461, section 3 and appendix C (schedules).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from tocom.errors import RateError

#: `8`: merge 8 tokens in every block. `(8, -0.5)`: 8 on average, fewer towards the end
#: (inflection < 0) or the start (> 0). `[8, 8, 0, 4]`: tokens to merge, block by block.
#: A tuple of two is always the second form, also where both are whole numbers.
Rate: TypeAlias = int | tuple[int, float] | Sequence[int]


@dataclass(frozen=True)
class Plan:
    """Token counts of one forward.

    Attributes:
        tokens_in: tokens that enter the first block, prefix tokens included.
        prefix: tokens at the front that never merge.
        asked: tokens that the rate asks each block to remove.
        removed: tokens that each block does remove; less than `asked` where it is clipped.
    """

    tokens_in: int
    prefix: int
    asked: tuple[int, ...]
    removed: tuple[int, ...]

    @property
    def tokens(self) -> tuple[int, ...]:
        """Tokens that leave each block."""
        left, counts = self.tokens_in, []
        for removed in self.removed:
            left -= removed
            counts.append(left)
        return tuple(counts)

    @property
    def clipped(self) -> bool:
        """Whether some block removes fewer tokens than the rate asks for."""
        return self.asked != self.removed


def schedule(rate: Rate, depth: int) -> tuple[int, ...]:
    """Return the tokens that `rate` asks each of `depth` blocks to remove, before clipping.

    Args:
        rate: an int, `(int, inflection)` with the inflection in [-1, 1], or a list of ints,
            one a block; a shorter list leaves the remaining blocks unmerged. A tuple of two
            is always `(int, inflection)`.
        depth: number of blocks.

    Raises:
        RateError: naming the value and what is allowed.

    Reference: inflection runs linearly from `int(r (1 - inflection))` to twice r minus that,
        each block rounded down.
    """
    if isinstance(rate, bool):
        raise RateError(f"a rate is a whole number, (r, inflection) or a list, got {rate!r}")
    if isinstance(rate, int):
        return (_count(rate, "rate"),) * depth
    if isinstance(rate, str | bytes) or not isinstance(rate, Sequence):
        raise RateError(f"a rate is a whole number, (r, inflection) or a list, got {rate!r}")
    if isinstance(rate, tuple) and len(rate) == 2:
        return _inflected(_count(rate[0], "rate"), rate[1], depth)
    if len(rate) > depth:
        raise RateError(f"a list of rates has at most one entry a block ({depth}), got {len(rate)}")
    counts = tuple(_count(count, f"entry {i} of the rate") for i, count in enumerate(rate))
    return counts + (0,) * (depth - len(counts))


def plan(rate: Rate, depth: int, tokens: int, prefix: int) -> Plan:
    """Return the plan of a forward at `rate`.

    Args:
        rate: see `schedule`.
        depth: number of blocks.
        tokens: tokens that enter the first block, prefix tokens included.
        prefix: class, distillation and register tokens, which never merge.

    Returns:
        The plan. A block removes at most half of the tokens that may merge,
        `(N - prefix) // 2`; where that bites, `Plan.clipped` is true.

    Raises:
        RateError: if the rate is malformed.
    """
    asked = schedule(rate, depth)
    left, removed = tokens, []
    for count in asked:
        removed.append(min(count, (left - prefix) // 2))
        left -= removed[-1]
    return Plan(tokens_in=tokens, prefix=prefix, asked=asked, removed=tuple(removed))


def _inflected(r: int, inflection: object, depth: int) -> tuple[int, ...]:
    if isinstance(inflection, bool) or not isinstance(inflection, int | float):
        raise RateError(f"the inflection must be a number, got {inflection!r}")
    if not -1 <= inflection <= 1:
        raise RateError(f"the inflection must be in [-1, 1], got {inflection}")
    low = int(r * (1 - inflection))
    rise = 2 * (r - low)
    # In whole numbers: a float step, added up, can end one token short of the last block's.
    return tuple(low + rise * i // max(depth - 1, 1) for i in range(depth))


def _count(value: object, what: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise RateError(f"{what} must be a whole number, got {value!r}")
    if value < 0:
        raise RateError(f"{what} must be 0 or more, got {value}")
    return value
