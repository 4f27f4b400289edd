"""How a metric learns which tokens merge, although a choice has no gradient.

While it learns, merging is soft: each token of the one set gives a share of itself to all tokens of
the other, the more the more alike they are, and what is left of it stays. Gradients reach the
metric through the shares. Order and number of the tokens that go on are those of hard merging, so
that each block pairs what it pairs when nothing is soft; what hard merging would have merged away
follows behind them, as small as soft merging has left it, and merges no more.

Letters: B images, N tokens, A and B (as counts) tokens of the two sets, r tokens that merge.
Reference: Decoupled Token Embedding for Merging (DTEM), arXiv:2412.10569, section 3. That a
threshold makes the shares add up to r, and what becomes of the rest of a token, are ours.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tocom.merging import match, unrounded
from tocom.reduction import DTEM, Cut, Fate, Seen, Tokens

#: What is left of a token at least: nothing has no logarithm.
_LEAST = 1e-6


@dataclass(frozen=True)
class SoftDTEM(DTEM):
    """`DTEM` while its metric learns: see the module.

    Attributes:
        temperature: how soft, in cosine similarity; towards 0 it is `DTEM`.
        removed: tokens that hard merging takes away in each block, on the rung that runs.
    """

    temperature: float = 0.1
    removed: tuple[int, ...] = ()

    def reduce(self, tokens: Tokens, seen: Seen | None, cut: Cut) -> tuple[Tokens, Fate | None]:
        """Merge softly: N tokens leave, the first `cut.leaving` of which merge further on."""
        assert seen is not None
        removed = self.removed[cut.block]
        active = cut.leaving + removed
        x, size = tokens.x, tokens.size
        size = x.new_ones(*x.shape[:2], 1, dtype=torch.float32) if size is None else size
        attention = self.merging.attention(seen)
        bias = self.merging.bias(size.detach(), attention)
        weight = size
        if attention is not None:
            attention = attention.detach()
            weight = attention.unsqueeze(-1) if self.weight == "class" else size
        metric = self.metric(x[:, :active], cut)
        bias = None if bias is None else bias[:, :active].detach()
        scores = _scores(metric, bias, cut.prefix)
        shares = soft_shares(scores, removed, self.temperature)
        new = soft_merge(x[:, :active], size[:, :active], weight[:, :active], shares, cut.prefix)
        hard = match(metric, removed, cut.prefix, bias=bias)
        order = torch.cat([hard.kept, hard.merged], dim=1).unsqueeze(-1)
        left = Tokens(
            torch.cat([new.x.take_along_dim(order, dim=1), x[:, active:]], dim=1),
            torch.cat([new.size.take_along_dim(order, dim=1), size[:, active:]], dim=1),
        )
        if not cut.trace:
            return left, None
        behind = torch.arange(active, x.shape[1], device=x.device).expand(len(x), -1)
        return left, Fate(torch.cat([hard.assignment, behind], dim=1))


class Merged(NamedTuple):
    """Tokens after soft merging, each in its place."""

    x: Tensor  # [B, N, D]
    size: Tensor  # [B, N, 1]


def soft_shares(scores: Tensor, removed: int, temperature: float) -> Tensor:
    """Return the share [B, A, B] of each token of the one set that each of the other gets.

    With S the scores and τ the temperature:

        share_ij = p_i q_ij,  q_ij = exp(S_ij / τ) / Σ_k exp(S_ik / τ),
        p_i = sigmoid((s_i - θ) / τ),  s_i = τ log Σ_k exp(S_ik / τ),  θ such that Σ_i p_i = r.

    q is a soft choice of the partner, s_i a soft maximum of row i, and p a soft choice of the r
    rows with the highest. Towards τ = 0 it is the choice that bipartite matching takes.

    Args:
        scores: [B, A, B] how alike the tokens of each pair are; r of A rows merge.
        removed: r, at most A.
        temperature: τ.
    """
    scaled = scores / temperature
    best = scaled.logsumexp(dim=2)  # [B, A] s / τ
    gives = torch.sigmoid(best - _threshold(best, removed))
    return gives.unsqueeze(2) * scaled.softmax(dim=2)


def soft_merge(x: Tensor, size: Tensor, weight: Tensor, shares: Tensor, prefix: int) -> Merged:
    """Return tokens of which those at even places have given shares to those at odd ones.

    A token j gets x_j ← (w_j x_j + Σ_i share_ij w_i x_i) / (w_j + Σ_i share_ij w_i), and sizes m
    become m_j + Σ_i share_ij m_i; of a token i, m_i (1 - Σ_j share_ij) is left, and x_i as it is.
    All sizes together stay as they are.

    Args:
        x: [B, N, D] tokens.
        size: [B, N, 1] input tokens that each stands for.
        weight: [B, N, 1] more than 0, weighs in the mean.
        shares: [B, A, B] without the prefix tokens.
        prefix: tokens at the front that stay as they are.
    """
    a, b = slice(2 * ((prefix + 1) // 2), None, 2), slice(2 * (prefix // 2) + 1, None, 2)
    given = shares.transpose(1, 2)  # [B, B, A]
    sums = weight[:, b] * x[:, b] + given @ (weight[:, a] * x[:, a])
    means = sums / (weight[:, b] + given @ weight[:, a])
    left = (1 - shares.sum(dim=2, keepdim=True)).clamp(min=_LEAST)
    new_x, new_size = x.clone(), size.clone()
    new_x[:, b] = means.to(x.dtype)
    new_size[:, a] = size[:, a] * left
    new_size[:, b] = size[:, b] + given @ size[:, a]
    return Merged(new_x, new_size)


def _scores(metric: Tensor, bias: Tensor | None, prefix: int) -> Tensor:
    """Return what `match` compares [B, A, B], with gradients and without the prefix tokens."""
    with unrounded(metric):
        metric = F.normalize(metric, dim=-1)
        scores = metric[:, ::2] @ metric[:, 1::2].transpose(1, 2)
    if bias is not None:
        scores = scores + bias[:, ::2, None] + bias[:, None, 1::2]
    return scores[:, (prefix + 1) // 2 :, prefix // 2 :]


def _threshold(best: Tensor, removed: int) -> Tensor:
    """Return θ [B, 1] at which sigmoid(best - θ) adds up to `removed`, over best [B, A].

    Found by halving, without a gradient; that of θ follows from what it solves.
    """
    values = best.detach()
    low, high = values.amin(1, keepdim=True) - 30, values.amax(1, keepdim=True) + 30
    for _ in range(50):
        middle = (low + high) / 2
        too_many = torch.sigmoid(values - middle).sum(1, keepdim=True) > removed
        low, high = torch.where(too_many, middle, low), torch.where(too_many, high, middle)
    gives = torch.sigmoid(values - high)
    slope = gives * (1 - gives)
    pull = slope / slope.sum(1, keepdim=True).clamp(min=torch.finfo(slope.dtype).tiny)
    return high + (pull * (best - values)).sum(1, keepdim=True)
