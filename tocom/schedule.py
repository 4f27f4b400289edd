"""From a rate of the paper's ladder to the tokens that it asks every block to remove.

Reference: Token Merging, arXiv:2210.09461, section 3 and appendix C (schedules).
"""

from collections.abc import Sequence
from typing import TypeAlias

from tocom.errors import RateError

#: `8`: merge 8 tokens in every block. `(8, -0.5)`: 8 on average, fewer towards the end
#: (inflection < 0) or the start (> 0). `[8, 8, 0, 4]`: tokens to merge, block by block.
#: A tuple of two is always the second form, also where both are whole numbers.
Rate: TypeAlias = int | tuple[int, float] | Sequence[int]


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
