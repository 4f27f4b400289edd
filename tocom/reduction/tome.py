"""Token Merging: the most similar tokens become their mean.

Reference: Token Merging (ToMe), arXiv:2210.09461, section 3. The penalties are ours.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from tocom.errors import ReductionError
from tocom.merging import match, merge
from tocom.reduction.protocol import Cut, Fate, Method, Place, Seen, Tokens, Unit


@dataclass(frozen=True)
class ToMe(Method):
    """Merge between attention and MLP, by the similarity of keys.

    Attributes:
        importance: how much what the class token attends to is kept from merging: the logarithm
            of each token's share of its attention, times this, is taken off the similarity.
        size: how much tokens that stand for many are kept from merging, likewise.
    """

    name: ClassVar = "tome"
    place: ClassVar = Place.BETWEEN
    unit: ClassVar = Unit.REMOVED
    sizes: ClassVar = True
    importance: float = 0.0
    size: float = 0.0

    def __post_init__(self) -> None:
        """Raise ReductionError if an option is out of range."""
        for option in ("importance", "size"):
            value = getattr(self, option)
            if (
                isinstance(value, bool)
                or not isinstance(value, int | float)
                or not 0 <= value < math.inf
            ):
                raise ReductionError(
                    f"the option {option!r} of the method 'tome' must be a number of 0 or more, "
                    f"got {value!r}"
                )

    def refuse(self, model: VisionTransformer) -> str | None:
        """Without a class token nothing says what is important."""
        if self.importance and not model.has_class_token:
            return "importance reads the class token, and the model has none"
        return None

    def fewest(self, patches: int) -> int:
        """Of each pair of tokens one can merge into the other."""
        return patches - patches // 2

    def reduce(self, tokens: Tokens, seen: Seen | None, cut: Cut) -> tuple[Tokens, Fate | None]:
        """Match and merge."""
        assert seen is not None
        removed = tokens.x.shape[1] - cut.leaving
        penalty = self._penalty(tokens, seen)
        merging = match(seen.mean_key, removed, cut.prefix, cut.trace, penalty)
        x, size = merge(tokens.x, tokens.size, merging)
        return Tokens(x, size), Fate(merging.assignment, merging.margin) if cut.trace else None

    def macs(self, tokens: int, leaving: int, width: int, heads: int) -> int:
        """Of the similarity of the two sets, and of one row of attention."""
        similarity = (tokens + 1) // 2 * (tokens // 2) * (width // heads)
        return similarity + (tokens * width if self.importance else 0)

    def _penalty(self, tokens: Tokens, seen: Seen) -> Tensor | None:
        penalty = None
        if self.importance:
            # The mean over all tokens is 0 if attention is even: as strong with few as with many.
            attention = seen.class_attention * tokens.x.shape[1]
            penalty = self.importance * attention.clamp(min=1e-12).log()
        if self.size and tokens.size is not None:
            sizes = self.size * tokens.size.squeeze(-1).log()
            penalty = sizes if penalty is None else penalty + sizes
        return penalty
