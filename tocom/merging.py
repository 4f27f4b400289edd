"""Token merging: which tokens are alike, and the merge of them.

Works on any tokens [B, N, C]; knows nothing of models. Prefix tokens (class,
distillation, registers) stand at the front and never merge, however many there are.

Letters: B images, N tokens in, M = N - r tokens out, r tokens merged away.
Reference: Token Merging (ToMe), arXiv:2210.09461, section 3 and appendix D.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tocom.errors import RateError, ShapeError


@dataclass(frozen=True)
class Match:
    """One block's decision: where every token goes.

    Attributes:
        kept: [B, M] the input position from which each output token starts.
        merged: [B, r] input positions that are merged away.
        into: [B, r] the output token that each of them joins.
        margin: [B] by how much similarity the closest decision was taken, at most 2; None
            unless asked for. Near 0, rounding may decide otherwise.
    """

    kept: Tensor
    merged: Tensor
    into: Tensor
    margin: Tensor | None = None

    @property
    def assignment(self) -> Tensor:
        """[B, N] the output token that holds each input token."""
        batch, kept = self.kept.shape
        tokens = kept + self.merged.shape[1]
        out = torch.arange(kept, device=self.kept.device).expand(batch, kept)
        assignment = self.kept.new_empty(batch, tokens).scatter(1, self.kept, out)
        return assignment.scatter(1, self.merged, self.into)


def match(
    metric: Tensor, r: int, prefix: int, margin: bool = False, bias: Tensor | None = None
) -> Match:
    """Bipartite soft matching: pair the `r` most similar tokens of two alternating sets.

    Tokens at even positions form set A, at odd positions set B. Each A token finds its most
    similar B token; the r best pairs merge. Several A tokens may join one B token.

    Args:
        metric: [B, N, d] what is compared, by cosine; the mean of the keys over the heads.
        r: tokens to merge away, in [0, (N - prefix) // 2].
        prefix: tokens at the front that never merge.
        margin: also measure how close the decisions were.
        bias: [B, N] what each token adds to the similarity of its pairs; None: nothing.

    Returns:
        The match. Output order: prefix tokens, what is left of A in its order (without a prefix
        in order of falling similarity, as the reference has it), then all of B.

    Raises:
        RateError: if r is out of range.
    """
    batch, tokens, _ = metric.shape
    if not 0 <= r <= (tokens - prefix) // 2:
        raise RateError(
            f"of {tokens} tokens with {prefix} prefix tokens at most "
            f"{(tokens - prefix) // 2} can merge at once, got {r}"
        )
    prefix_a, prefix_b = (prefix + 1) // 2, prefix // 2
    scores = similarity(metric)  # [B, A, B]
    if bias is not None:
        scores += bias[:, ::2, None] + bias[:, None, 1::2]
    scores[:, :prefix_a] = -torch.inf
    scores[:, :, :prefix_b] = -torch.inf
    best, partner = scores.max(dim=-1)  # [B, A]
    order = best.argsort(dim=-1, descending=True)
    chosen, rest = order[:, :r], order[:, r:]
    if prefix:
        rest = rest.sort(dim=-1).values

    # Positions in the input: A's i-th token is 2 i, B's j-th is 2 j + 1.
    front = torch.arange(prefix, device=metric.device).expand(batch, prefix)
    rest_a = 2 * rest[:, prefix_a:]
    rest_b = torch.arange(2 * prefix_b + 1, tokens, 2, device=metric.device)
    kept = torch.cat([front, rest_a, rest_b.expand(batch, -1)], dim=1)
    first_b = prefix + rest_a.shape[1]
    into = first_b + partner.gather(1, chosen) - prefix_b
    gap = closest(scores, best, order, r, prefix) if margin else None
    return Match(kept=kept, merged=2 * chosen, into=into, margin=gap)


def merge(
    x: Tensor, size: Tensor | None, match: Match, weight: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Merge tokens: the mean of each group weighted by size; sizes add up.

    Args:
        x: [B, N, C] tokens.
        size: [B, N, 1] input tokens that each token stands for; None: one each.
        match: which tokens merge.
        weight: [B, N, 1] more than 0, weighs in the mean instead of the size; None: the size.

    Returns:
        Tokens [B, M, C] in the dtype of x and sizes [B, M, 1] in fp32.

    Raises:
        ShapeError: if x, size and match disagree about the tokens.
    """
    tokens = match.kept.shape[1] + match.merged.shape[1]
    if x.shape[1] != tokens or (size is not None and size.shape != (*x.shape[:2], 1)):
        raise ShapeError(
            f"this match is of {tokens} tokens, got x {tuple(x.shape)}"
            + ("" if size is None else f" and size {tuple(size.shape)}")
        )
    batch, width = x.shape[0], x.shape[2]
    left = match.kept.shape[1]
    image = torch.arange(batch, device=x.device).unsqueeze(1)
    # Whole rows, which a CPU copies up to ten times as fast as gather and scatter_add do.
    kept = (match.kept + tokens * image).flatten()
    merged = (match.merged + tokens * image).flatten()
    into = (match.into + left * image).flatten()
    rows = x.reshape(batch * tokens, width)
    # In fp32 whatever x is: bf16 counts to 256 only, and would add up its rounding errors.
    sizes = x.new_ones(batch * tokens, 1, dtype=torch.float32) if size is None else size.float()
    sizes = sizes.reshape(batch * tokens, 1)
    kept_sizes, merged_sizes = sizes.index_select(0, kept), sizes.index_select(0, merged)
    total = kept_sizes.index_add(0, into, merged_sizes)
    kept_weights, merged_weights, whole = kept_sizes, merged_sizes, total
    if weight is not None:
        weights = weight.float().reshape(batch * tokens, 1)
        kept_weights, merged_weights = (
            weights.index_select(0, kept),
            weights.index_select(0, merged),
        )
        whole = kept_weights.index_add(0, into, merged_weights)
    # What nothing merges into has weight 1 and stays as it is.
    mean = rows.index_select(0, kept) * (kept_weights / whole)
    weights = merged_weights / whole.index_select(0, into)
    mean.index_add_(0, into, rows.index_select(0, merged) * weights)
    return mean.to(x.dtype).view(batch, left, width), total.view(batch, left, 1)


def unmerge(x: Tensor, match: Match) -> Tensor:
    """Give every input token the value of the group it merged into: [B, M, C] -> [B, N, C].

    Raises:
        ShapeError: if x has other tokens than the match leaves.
    """
    if x.shape[1] != match.kept.shape[1]:
        raise ShapeError(f"this match leaves {match.kept.shape[1]} tokens, got x {tuple(x.shape)}")
    return spread(x, match.assignment)


def spread(x: Tensor, source: Tensor) -> Tensor:
    """Return the rows [B, N, C] of x [B, M, C] that `source` [B, N] names."""
    batch, tokens, width = x.shape
    image = torch.arange(batch, device=x.device).unsqueeze(1)
    # Whole rows, which a CPU copies faster than gather does.
    rows = (source + tokens * image).flatten()
    return x.reshape(batch * tokens, width).index_select(0, rows).view(*source.shape, width)


def similarity(metric: Tensor) -> Tensor:
    """Return the cosines [B, A, B] of the tokens at even positions with those at odd positions.

    In fp32 whatever the model's dtype or autocast is: half precision ties what is not tied.
    """
    with unrounded(metric):
        metric = F.normalize(metric.detach().float(), dim=-1)
        return metric[:, ::2] @ metric[:, 1::2].transpose(1, 2)


def closest(scores: Tensor, best: Tensor, order: Tensor, r: int, prefix: int) -> Tensor:
    """Return the smallest gap [B] between what was chosen and what came next, at most 2.

    Args:
        scores: [B, A, B] of all pairs; -inf: may not be.
        best: [B, A] the highest of each row.
        order: [B, A] the rows, the best first.
        r: rows that are chosen, the first of the order.
        prefix: without one, the order of the rest is a decision, too.
    """
    top = scores.topk(min(2, scores.shape[-1]), dim=-1).values
    partner_gap = top[..., 0] - top[..., -1] if top.shape[-1] == 2 else torch.full_like(best, 2.0)
    chosen_gap = partner_gap.gather(1, order[:, :r])
    if chosen_gap.shape[1] == 0:
        return best.new_full((best.shape[0],), 2.0)
    ranked = best.gather(1, order)
    ranked_gap = ranked[:, r - 1 : -1] - ranked[:, r:]
    if prefix:  # the rest keeps its order; without a prefix its ranks decide the next block's sets
        ranked_gap = ranked_gap[:, :1]
    return torch.cat([chosen_gap, ranked_gap], dim=1).amin(dim=1).clamp(max=2.0)


def unrounded(tensor: Tensor) -> AbstractContextManager[object]:
    """Return a context without the autocast of the device of `tensor`: products in fp32.

    For those that decide something.
    """
    device = tensor.device.type
    # Entered only if need be: on small batches it takes as long as what it is for.
    autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.autocast(device, enabled=False) if autocast else nullcontext()
