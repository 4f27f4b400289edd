"""DiffRate: the class token says what is kept; the rest is pruned or merged into it.

Does not learn how many tokens each block prunes and merges: ladders say it.
Reference: DiffRate, arXiv:2305.17997, section 3. Ours are that sizes add up whole, that means are
weighted by them, and the comparison of keys.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from tocom.merging import Match, merge, unrounded
from tocom.reduction.options import check_number
from tocom.reduction.protocol import Cut, Fate, Heads, Method, Place, Seen, Tokens, Unit


@dataclass(frozen=True)
class DiffRate(Method):
    """Between attention and MLP, keep the patches that the class token attends to most.

    Attributes:
        pruned: share of the tokens that leave which is dropped, those of least attention; the
            others merge into the most similar patch that stays. Half is better than none or all.
    """

    name: ClassVar = "diffrate"
    place: ClassVar = Place.BETWEEN
    unit: ClassVar = Unit.REMOVED
    sizes: ClassVar = True
    needs_class: ClassVar = True

    pruned: float = 0.5

    def __post_init__(self) -> None:
        """Raise ReductionError if an option is malformed."""
        check_number(self.name, "pruned", self.pruned, most=1)

    def reduce(self, tokens: Tokens, seen: Seen | None, cut: Cut) -> tuple[Tokens, Fate | None]:
        """Rank, prune and merge."""
        assert seen is not None
        batch, count, _ = tokens.x.shape
        attention = seen.class_attention[:, cut.prefix :]
        order = attention.argsort(dim=-1, descending=True) + cut.prefix
        staying = cut.leaving - cut.prefix
        merging = count - cut.leaving - self._dropped(count - cut.leaving)
        front = torch.arange(cut.prefix, device=order.device).expand(batch, -1)
        kept = torch.cat([front, order[:, :staying].sort(dim=-1).values], dim=1)
        merged = order[:, staying : staying + merging]
        scores = _cosines(seen.mean_key, merged, kept)
        scores[:, :, : cut.prefix] = -torch.inf
        into = scores.argmax(dim=-1)

        # What is dropped goes first: a match is of tokens that all are somewhere afterwards.
        taken = torch.cat([kept, merged], dim=1)
        out = torch.arange(taken.shape[1], device=order.device).expand(batch, -1)
        match = Match(out[:, : cut.leaving], out[:, cut.leaving :], into)
        size = None if tokens.size is None else _rows(tokens.size, taken)
        x, size = merge(_rows(tokens.x, taken), size, match)
        if not cut.trace:
            return Tokens(x, size), None
        went = order.new_full((batch, count), -1).scatter(1, taken, match.assignment)
        borders = [edge for edge in (staying, staying + merging) if 0 < edge < count - cut.prefix]
        return Tokens(x, size), Fate(went, _margin(attention, borders, scores))

    def macs(self, tokens: int, leaving: int, width: int, heads: Heads) -> int:
        """Of the attention of the class token, and of what merges with what stays."""
        merging = tokens - leaving - self._dropped(tokens - leaving)
        return tokens * heads.channels + merging * leaving * (heads.width)

    def _dropped(self, removed: int) -> int:
        return int(self.pruned * removed + 0.5)


def _rows(x: Tensor, positions: Tensor) -> Tensor:
    """Return the rows [B, M, C] of x [B, N, C] at positions [B, M]."""
    return x.gather(1, positions.unsqueeze(-1).expand(-1, -1, x.shape[2]))


def _cosines(metric: Tensor, some: Tensor, others: Tensor) -> Tensor:
    """Return the cosines [B, S, O] of tokens at positions [B, S] with those at [B, O]."""
    with unrounded(metric):
        metric = F.normalize(metric.detach(), dim=-1)
        return _rows(metric, some) @ _rows(metric, others).transpose(1, 2)


def _margin(attention: Tensor, borders: list[int], scores: Tensor) -> Tensor:
    """Return the smallest gap [B], of logarithms of attention and of cosines, at most 2."""
    ranked = attention.sort(dim=-1, descending=True).values
    gaps = [(ranked[:, edge - 1] / ranked[:, edge]).log() for edge in borders]
    if scores.shape[1]:
        top = scores.topk(min(2, scores.shape[-1]), dim=-1).values
        gaps.append((top[..., 0] - top[..., 1]).amin(dim=1))
    return torch.stack(gaps, dim=1).clamp(max=2.0).amin(dim=1)
