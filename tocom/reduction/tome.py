"""Token Merging: the most similar tokens become their mean.

Reference: Token Merging (ToMe), arXiv:2210.09461, section 3. The options are ours; that
important and large tokens should merge late, and weigh by attention in the mean, is from MCTF,
arXiv:2403.10030, section 3.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tocom.merging import Match, match, merge
from tocom.reduction.options import check_number, check_one_of
from tocom.reduction.protocol import Cut, Fate, Heads, Method, Place, Seen, Tokens, Unit

METRICS = ("keys", "tokens")
WEIGHTS = ("size", "class")


@dataclass(frozen=True)
class ToMe(Method):
    """Merge the most similar tokens between attention and MLP.

    Attributes:
        importance: how much the logarithm of the attention that the class token pays to a token
            keeps it from merging, in cosine similarity; 0: nothing. .05 is a good value.
        size: the same of the logarithm of the input tokens that it stands for.
        metric: what is compared: `"keys"`, their mean over the heads, as in the paper; or
            `"tokens"` themselves.
        weight: of a token in the mean: `"size"`, the input tokens that it stands for, as in the
            paper; or `"class"`, the attention that the class token pays to it.
    """

    name: ClassVar = "tome"
    place: ClassVar = Place.BETWEEN
    unit: ClassVar = Unit.REMOVED
    sizes: ClassVar = True

    importance: float = 0.0
    size: float = 0.0
    metric: str = "keys"
    weight: str = "size"

    def __post_init__(self) -> None:
        """Raise ReductionError if an option is malformed."""
        check_number(self.name, "importance", self.importance)
        check_number(self.name, "size", self.size)
        check_one_of(self.name, "metric", self.metric, METRICS)
        check_one_of(self.name, "weight", self.weight, WEIGHTS)

    @property
    def needs_class(self) -> bool:  # type: ignore[override]
        """Whether it reads the attention of the class token."""
        return self.importance > 0 or self.weight == "class"

    def fewest(self, patches: int) -> int:
        """Of each pair of tokens one can merge into the other."""
        return patches - patches // 2

    def reduce(self, tokens: Tokens, seen: Seen | None, cut: Cut) -> tuple[Tokens, Fate | None]:
        """Match and merge."""
        assert seen is not None
        left, merging = self.merged(tokens, seen, cut)
        return left, Fate(merging.assignment, merging.margin) if cut.trace else None

    def merged(
        self, tokens: Tokens, seen: Seen, cut: Cut, metric: Tensor | None = None
    ) -> tuple[Tokens, Match]:
        """Return the tokens that are left, and how they merged.

        Args:
            tokens, seen, cut: as of `reduce`.
            metric: [B, N, d] what is compared; None: as the option says.
        """
        removed = tokens.x.shape[1] - cut.leaving
        if metric is None:
            metric = tokens.x if self.metric == "tokens" else seen.mean_key
        attention = self.attention(seen)
        bias = self.bias(tokens.size, attention)
        merging = match(metric, removed, cut.prefix, margin=cut.trace, bias=bias)
        weight = None
        if attention is not None and self.weight == "class":
            weight = attention.unsqueeze(-1)
        return Tokens(*merge(tokens.x, tokens.size, merging, weight)), merging

    def macs(self, tokens: int, leaving: int, width: int, heads: Heads) -> int:
        """Of the similarity of the two sets, and of the attention of the class token."""
        compared = width if self.metric == "tokens" else heads.width
        matching = (tokens + 1) // 2 * (tokens // 2) * compared
        return matching + (tokens * heads.channels if self.needs_class else 0)

    def attention(self, seen: Seen) -> Tensor | None:
        """Return the attention of the class token [B, N], which is never 0, if it is needed."""
        if not self.needs_class:
            return None
        # What is rounded to 0 has a logarithm and a weight, too.
        return seen.class_attention.clamp(min=torch.finfo(torch.float32).tiny)

    def bias(self, size: Tensor | None, attention: Tensor | None) -> Tensor | None:
        """Return what keeps each token [B, N] from merging, as a change of its similarity.

        Args:
            size: [B, N, 1] input tokens that each stands for; None: one each.
            attention: [B, N] of the class token; None: not needed.
        """
        bias = None
        if attention is not None and self.importance:
            bias = -self.importance * attention.log()
        if self.size and size is not None:
            small = -self.size * size.squeeze(-1).log()
            bias = small if bias is None else bias + small
        return bias
