"""Token Merging: the most similar tokens become their mean.

Reference: Token Merging (ToMe), arXiv:2210.09461, section 3.
"""

from dataclasses import dataclass
from typing import ClassVar

from tocom.merging import match, merge
from tocom.reduction.protocol import Cut, Fate, Method, Place, Seen, Tokens, Unit


@dataclass(frozen=True)
class ToMe(Method):
    """Merge between attention and MLP, by the similarity of keys."""

    name: ClassVar = "tome"
    place: ClassVar = Place.BETWEEN
    unit: ClassVar = Unit.REMOVED
    sizes: ClassVar = True

    def fewest(self, patches: int) -> int:
        """Of each pair of tokens one can merge into the other."""
        return patches - patches // 2

    def reduce(self, tokens: Tokens, seen: Seen | None, cut: Cut) -> tuple[Tokens, Fate | None]:
        """Match and merge."""
        assert seen is not None
        removed = tokens.x.shape[1] - cut.leaving
        merging = match(seen.mean_key, removed, cut.prefix, margin=cut.trace)
        x, size = merge(tokens.x, tokens.size, merging)
        return Tokens(x, size), Fate(merging.assignment, merging.margin) if cut.trace else None

    def macs(self, tokens: int, leaving: int, width: int, heads: int) -> int:
        """Of the similarity of the two sets."""
        return (tokens + 1) // 2 * (tokens // 2) * (width // heads)
