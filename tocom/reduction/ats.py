"""Adaptive Token Sampling: each picture decides how many tokens it needs.

A token is significant as far as the class token reads from it. K points, spread evenly, each pick
the token at which the cumulated significance is nearest; tokens that several points pick stay once.
So few significant tokens leave few, many leave many, up to K.

What leaves a block is always padded to K, whatever the pictures, and the padding is masked:
an answer does not depend on the other pictures of a batch.

Letters: B images, H heads, P patch tokens, d their width, K points.
Reference: Adaptive Token Sampling (ATS), arXiv:2111.15667, section 3; the variants are of its
code and of that of Which Tokens to Use?, arXiv:2308.04657.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from tocom.reduction.options import check_one_of
from tocom.reduction.protocol import Chosen, Cut, Heads, Method, Place, Seen, Tokens, Unit

VARIANTS = ("paper", "tokenreduction", "official")


@dataclass(frozen=True)
class ATS(Method):
    """Attention answers for the tokens that are sampled only.

    Attributes:
        variant: whose sampling, see `significance` and `sample`.
    """

    name: ClassVar = "ats"
    place: ClassVar = Place.ATTENTION
    unit: ClassVar = Unit.KEPT
    needs_class: ClassVar = True
    by_picture: ClassVar = True
    variant: str = "paper"

    def __post_init__(self) -> None:
        """Raise ReductionError if there is no such variant."""
        check_one_of(self.name, "variant", self.variant, VARIANTS)

    def choose(self, tokens: Tokens, seen: Seen, cut: Cut) -> Chosen:
        """Sample patch tokens and put them behind the prefix tokens."""
        prefix = cut.prefix
        attention, v = seen.class_rows[:, :, prefix:], seen.v[:, :, prefix:]
        live = None if tokens.live is None else tokens.live[:, prefix:]
        score = significance(attention, v, self.variant)
        sampled = sample(score, cut.leaving - prefix, self.variant, live, margin=cut.trace)
        assert sampled.live is not None
        front = torch.arange(prefix, device=score.device).expand(score.shape[0], prefix)
        rows = torch.cat([front, prefix + sampled.rows], dim=1)
        return Chosen(rows, F.pad(sampled.live, (prefix, 0), value=True), sampled.margin)

    def macs(self, tokens: int, leaving: int, width: int, heads: Heads) -> int:
        """Of one row of attention."""
        return tokens * heads.channels


def significance(attention: Tensor, v: Tensor, variant: str = "paper") -> Tensor:
    """Return how much the class token reads from each patch token: shares, in fp32.

    Args:
        attention: [B, H, P] of the class token; 0 for padding.
        v: [B, H, P, d] values.
        variant: `"paper"`: attention times the norm of the value, of each head in shares, and
            their mean; `"tokenreduction"`: the heads count as much as they read;
            `"official"`: the attention of all heads times the norm of their values side by side.

    Returns:
        [B, P].
    """
    attention, norms = attention.float(), torch.linalg.vector_norm(v.float(), dim=-1)
    if variant == "official":
        return _shares(attention.sum(dim=1) * torch.linalg.vector_norm(norms, dim=1))
    if variant == "tokenreduction":
        score = (attention * norms).sum(dim=1)
        return _ratio(score, score.sum(dim=-1, keepdim=True) + 1e-6)
    return _shares(_shares(attention * norms).sum(dim=1))


def sample(
    score: Tensor,
    count: int,
    variant: str = "paper",
    live: Tensor | None = None,
    margin: bool = False,
) -> Chosen:
    """Return the tokens that points between 0 and 1 pick, by the cumulated score.

    Args:
        score: [B, P] shares, as `significance` has them.
        count: K, at least 1.
        variant: `"paper"`: K points, each in the middle of its part; tokens in their order.
            `"tokenreduction"`: the last point is left out, unless rounding leaves it in.
            `"official"`: tokens by rising score; points from the least that is above 0 to 1.
        live: [B, P] False: padding, which is behind all other tokens and is not picked.
        margin: also measure by how much the closest decision was taken.

    Returns:
        K positions, each token once; in order of rising score for `"official"`, else rising. What
        is not needed is padding.
    """
    order = None
    if variant == "official":
        score, order = score.sort(dim=1, stable=True)
        total = score.cumsum(dim=1)
        # With padding, which has score 0, the least significant token is above 0, too.
        total = _ratio(total - total[:, :1], total[:, -1:] - total[:, :1])
        least = total.masked_fill(total <= 0, 1).amin(dim=1, keepdim=True)
        points = least + (1 - least) * torch.linspace(0, 1, count, device=score.device)
    else:
        total = score.cumsum(dim=1)
        if live is not None:
            total = total.masked_fill(~live, torch.inf)
        points = _points(count, variant, score.device).repeat(len(score), 1)

    # The nearest changes half-way; of two as near it is the first.
    bounds = (total[:, 1:] + total[:, :-1]) / 2
    picked = torch.searchsorted(bounds, points)  # rises along the points
    slot = F.pad((picked.diff(dim=1) > 0).cumsum(dim=1), (1, 0))
    rows = picked.new_zeros(len(score), count).scatter(1, slot, picked)
    full = torch.arange(count, device=score.device) <= slot[:, -1:]
    closest = _margin(score, bounds, points, picked, order is not None) if margin else None
    return Chosen(rows if order is None else order.gather(1, rows), full, closest)


def _points(count: int, variant: str, device: torch.device) -> Tensor:
    if variant == "tokenreduction" and count > 1:
        # In these very words: otherwise rounding leaves out others.
        first, end, step = 1 / (2 * count), (2 * count - 1) / (2 * count), 1 / count
        return torch.arange(first, end, step, device=device)
    return (torch.arange(count, device=device) + 0.5) / count


def _margin(score: Tensor, bounds: Tensor, points: Tensor, picked: Tensor, ordered: bool) -> Tensor:
    """Return how close a point [B] is to a bound, or scores are that decide the order."""
    ends = F.pad(bounds, (1, 1), value=torch.inf)
    below = (points - ends.gather(1, picked)).abs()
    above = (ends.gather(1, picked + 1) - points).abs()
    margin = torch.minimum(below, above).amin(dim=1)
    if ordered and score.shape[1] > 1:
        gap = score.diff(dim=1).masked_fill(score[:, :-1] <= 0, torch.inf)
        margin = torch.minimum(margin, gap.amin(dim=1))
    return margin.clamp(max=2.0)


def _shares(x: Tensor) -> Tensor:
    return _ratio(x, x.sum(dim=-1, keepdim=True))


def _ratio(x: Tensor, whole: Tensor) -> Tensor:
    # Of nothing, each has nothing.
    return x / whole.clamp(min=torch.finfo(x.dtype).tiny)
