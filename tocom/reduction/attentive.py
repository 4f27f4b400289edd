"""Top-K and EViT: the patch tokens that the class token attends to most stay.

Each acts between attention and MLP and ranks tokens by the attention of the class token in the
same block, mean over the heads. What is left stands in order of falling attention.

Letters: B images, N tokens in, M tokens out, P patch tokens in, K of them kept, C channels.
Reference: Top-K as in Which Tokens to Use?, arXiv:2308.04657, section 3; EViT, arXiv:2202.07800,
section 3.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tocom.merging import unrounded
from tocom.reduction.protocol import Chosen, Cut, Fate, Heads, Method, Place, Seen, Tokens, Unit
from tocom.reduction.ranking import highest


@dataclass(frozen=True)
class TopK(Method):
    """Keep the K patch tokens that the class token attends to most; drop the others."""

    name: ClassVar = "topk"
    place: ClassVar = Place.BETWEEN
    unit: ClassVar = Unit.KEPT
    needs_class: ClassVar = True

    def reduce(self, tokens: Tokens, seen: Seen | None, cut: Cut) -> tuple[Tokens, Fate | None]:
        """Rank and keep."""
        assert seen is not None
        kept = most_of(seen.class_attention[:, cut.prefix :], cut.leaving, cut)
        left = Tokens(take(tokens.x, kept.rows))
        return left, kept.fate(tokens.x.shape[1]) if cut.trace else None

    def macs(self, tokens: int, leaving: int, width: int, heads: Heads) -> int:
        """Of one row of attention."""
        return tokens * heads.channels


@dataclass(frozen=True)
class EViT(Method):
    """Keep the K patch tokens that the class token attends to most; fuse the others into one.

    The fused token comes last. K does not count it where it is made; in later blocks it is a token
    like others, kept or fused again. Where K + 1 tokens are no fewer than there are, none is made.
    """

    name: ClassVar = "evit"
    place: ClassVar = Place.BETWEEN
    unit: ClassVar = Unit.KEPT
    needs_class: ClassVar = True

    def leaving(self, amount: int, patches: int, grid: tuple[int, int]) -> int:
        """The kept tokens and the fused one."""
        return min(amount + 1, patches)

    def reduce(self, tokens: Tokens, seen: Seen | None, cut: Cut) -> tuple[Tokens, Fate | None]:
        """Rank, keep and fuse."""
        assert seen is not None
        attention = seen.class_attention
        kept = most_of(attention[:, cut.prefix :], cut.leaving - 1, cut)
        fused = fuse(tokens.x, attention, kept.rows)
        left = Tokens(torch.cat([take(tokens.x, kept.rows), fused], dim=1))
        if not cut.trace:
            return left, None
        fate = kept.fate(tokens.x.shape[1])
        # The fused token is no mean, and stands for no place in a picture.
        into = fate.into.masked_fill(fate.into < 0, cut.leaving - 1)
        return left, Fate(into, fate.margin, dense=fate.into)

    def macs(self, tokens: int, leaving: int, width: int, heads: Heads) -> int:
        """Of one row of attention, and of a sum over all tokens, where those kept weigh 0."""
        return tokens * (heads.channels + width)


def fuse(x: Tensor, attention: Tensor, kept: Tensor) -> Tensor:
    """Return the sum of the tokens that are not kept, each times its attention.

    It is a sum and no mean: the attention of the fused tokens does not add up to 1.

    Args:
        x: [B, N, C] tokens.
        attention: [B, N] of each.
        kept: [B, M] positions of the tokens to leave out.

    Returns:
        [B, 1, C] in the dtype of x.
    """
    weight = attention.scatter(1, kept, 0).float()
    with unrounded(x):
        return (weight.unsqueeze(1) @ x.float()).to(x.dtype)


def take(x: Tensor, rows: Tensor) -> Tensor:
    """Return the tokens [B, M, C] of x [B, N, C] at positions [B, M]."""
    batch, tokens, width = x.shape
    count = rows.shape[1]
    image = torch.arange(batch, device=x.device).unsqueeze(1)
    # Whole rows, which a CPU copies faster than gather does.
    rows = (rows + tokens * image).flatten()
    return x.reshape(batch * tokens, width).index_select(0, rows).view(batch, count, width)


def most_of(score: Tensor, leaving: int, cut: Cut) -> Chosen:
    """Return the prefix tokens and the patch tokens of the highest score, `leaving` in all.

    Args:
        score: [B, P] of the patch tokens, such as their attention.
        leaving: prefix tokens included.
        cut: how many of them there are, and whether to measure how close the choice was.
    """
    prefix = cut.prefix
    keep = leaving - prefix
    kept = highest(score, keep)
    front = torch.arange(prefix, device=kept.device).expand(kept.shape[0], prefix)
    margin = None
    if cut.trace:  # between the last that stays and the first that goes
        ranked = score.topk(keep + 1, dim=1).values
        margin = ranked[:, -2] - ranked[:, -1]
    return Chosen(torch.cat([front, prefix + kept], dim=1), margin=margin)
