"""Multi-criteria token fusion: alike, of little weight and small; merged in both directions.

Does not look one step ahead, as its authors do in training.
Reference: Multi-criteria Token Fusion (MCTF), arXiv:2403.10030, section 3.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tocom.merging import Match, closest, merge, similarity
from tocom.reduction.protocol import Cut, Fate, Heads, Method, Place, Seen, Tokens, Unit

#: How much the logarithms of attention received and of size count beside that of the similarity:
#: one over the paper's temperatures, 20 and 40 to 1.
ATTENTION, SIZE = 1 / 20, 1 / 40


@dataclass(frozen=True)
class MCTF(Method):
    """Merge between attention and MLP, by similarity, attention received and size at once.

    Half of the tokens go from one set of the bipartite matching to the other, half back, to what
    is left of the first. The mean weighs by attention received times size.
    """

    name: ClassVar = "mctf"
    place: ClassVar = Place.BETWEEN
    unit: ClassVar = Unit.REMOVED
    sizes: ClassVar = True

    def fewest(self, patches: int) -> int:
        """As of ToMe: then there is always something left to merge into."""
        return patches - patches // 2

    def reduce(self, tokens: Tokens, seen: Seen | None, cut: Cut) -> tuple[Tokens, Fate | None]:
        """Match in both directions and merge."""
        assert seen is not None
        # Attention that is rounded to 0 has a logarithm, too.
        received = seen.received.clamp(min=torch.finfo(torch.float32).tiny)
        toll = ATTENTION * received.log()
        weight = received.unsqueeze(-1)
        if tokens.size is not None:
            toll = toll + SIZE * tokens.size.squeeze(-1).log()
            weight = weight * tokens.size
        scores = similarity(seen.mean_key).clamp(min=-1 + 1e-6).log1p()
        scores -= toll[:, ::2, None] + toll[:, None, 1::2]
        removed = tokens.x.shape[1] - cut.leaving
        merging = match_both_ways(scores, removed, cut.prefix, cut.trace)
        x, size = merge(tokens.x, tokens.size, merging, weight)
        return Tokens(x, size), Fate(merging.assignment, merging.margin) if cut.trace else None

    def macs(self, tokens: int, leaving: int, width: int, heads: Heads) -> int:
        """Of the similarity of the two sets, and of all attention once more."""
        matching = (tokens + 1) // 2 * (tokens // 2) * (heads.width)
        return matching + tokens * tokens * heads.channels


def match_both_ways(scores: Tensor, r: int, prefix: int, margin: bool = False) -> Match:
    """Pair tokens of two alternating sets, first A with B, then B with what is left of A.

    A token of B that others merged into may itself merge, and takes them along.

    Args:
        scores: [B, A, B] of each pair, the higher the better; is written to.
        r: tokens to merge away, the larger half from A.
        prefix: tokens at the front that never merge.
        margin: also measure how close the decisions were.

    Returns:
        The match. Output order: prefix tokens, what is left of A, what is left of B.
    """
    batch, count_a, count_b = scores.shape
    prefix_a, prefix_b = (prefix + 1) // 2, prefix // 2
    from_a, from_b = r - r // 2, r // 2
    scores[:, :prefix_a] = -torch.inf
    scores[:, :, :prefix_b] = -torch.inf
    best, partner = scores.max(dim=-1)  # [B, A]
    order = best.argsort(dim=-1, descending=True)
    chosen = order[:, :from_a]
    gone = chosen.unsqueeze(-1).expand(-1, -1, count_b)
    back = scores.scatter(1, gone, -torch.inf).transpose(1, 2)
    best_b, partner_b = back.max(dim=-1)  # [B, B]
    order_b = best_b.argsort(dim=-1, descending=True)
    chosen_b = order_b[:, :from_b]

    # Positions in the input: A's i-th token is 2 i, B's j-th is 2 j + 1.
    front = torch.arange(prefix, device=scores.device).expand(batch, prefix)
    rest_a = 2 * order[:, from_a:].sort(dim=-1).values[:, prefix_a:]
    rest_b = 2 * order_b[:, from_b:].sort(dim=-1).values[:, prefix_b:] + 1
    kept = torch.cat([front, rest_a, rest_b], dim=1)
    out = torch.arange(kept.shape[1], device=scores.device).expand(batch, -1)
    place = kept.new_empty(batch, count_a + count_b).scatter(1, kept, out)
    into_a = place.gather(1, 2 * partner_b.gather(1, chosen_b))
    place = place.scatter(1, 2 * chosen_b + 1, into_a)
    into_b = place.gather(1, 2 * partner.gather(1, chosen) + 1)
    merged = torch.cat([2 * chosen, 2 * chosen_b + 1], dim=1)
    gap = None
    if margin:
        there = closest(scores, best, order, from_a, prefix=1)
        gap = torch.minimum(there, closest(back, best_b, order_b, from_b, prefix=1))
    return Match(kept, merged, torch.cat([into_b, into_a], dim=1), gap)
