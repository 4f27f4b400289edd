"""Token Merging: the most similar tokens become their mean.

Reference: Token Merging (ToMe), arXiv:2210.09461, section 3. The options are ours; that
important and large tokens should merge late is from MCTF, arXiv:2403.10030, section 3.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tocom.merging import match, merge
from tocom.reduction.options import check_number
from tocom.reduction.protocol import Cut, Fate, Method, Place, Seen, Tokens, Unit


@dataclass(frozen=True)
class ToMe(Method):
    """Merge between attention and MLP, by the similarity of keys.

    Attributes:
        importance: how much the logarithm of the attention that the class token pays to a token
            keeps it from merging, in cosine similarity; 0: nothing. .05 is a good value.
        size: the same of the logarithm of the input tokens that it stands for.
    """

    name: ClassVar = "tome"
    place: ClassVar = Place.BETWEEN
    unit: ClassVar = Unit.REMOVED
    sizes: ClassVar = True

    importance: float = 0.0
    size: float = 0.0

    def __post_init__(self) -> None:
        """Raise ReductionError if an option is malformed."""
        check_number(self.name, "importance", self.importance)
        check_number(self.name, "size", self.size)

    @property
    def needs_class(self) -> bool:  # type: ignore[override]
        """Whether it reads the attention of the class token."""
        return self.importance > 0

    def fewest(self, patches: int) -> int:
        """Of each pair of tokens one can merge into the other."""
        return patches - patches // 2

    def reduce(self, tokens: Tokens, seen: Seen | None, cut: Cut) -> tuple[Tokens, Fate | None]:
        """Match and merge."""
        assert seen is not None
        removed = tokens.x.shape[1] - cut.leaving
        bias = self._bias(tokens, seen)
        merging = match(seen.mean_key, removed, cut.prefix, margin=cut.trace, bias=bias)
        x, size = merge(tokens.x, tokens.size, merging)
        return Tokens(x, size), Fate(merging.assignment, merging.margin) if cut.trace else None

    def macs(self, tokens: int, leaving: int, width: int, heads: int) -> int:
        """Of the similarity of the two sets, and of the attention of the class token."""
        matching = (tokens + 1) // 2 * (tokens // 2) * (width // heads)
        return matching + (tokens * width if self.importance else 0)

    def _bias(self, tokens: Tokens, seen: Seen) -> Tensor | None:
        """Return what keeps each token [B, N] from merging, as a change of its similarity."""
        bias = None
        if self.importance:
            # Attention that is rounded to 0 has a logarithm, too.
            attention = seen.class_attention.clamp(min=torch.finfo(torch.float32).tiny)
            bias = -self.importance * attention.log()
        if self.size and tokens.size is not None:
            small = -self.size * tokens.size.squeeze(-1).log()
            bias = small if bias is None else bias + small
        return bias
