"""The same maths as tocom.merging and tocom.vit in plain loops: slow, obvious, one image.

Written from the papers' definitions and not from our code; in float64, so that a
disagreement is ours.
"""

import copy
import itertools
import math
from collections.abc import Sequence

import torch
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

Groups = list[list[int]]


def slow_match(metric: list[list[float]], r: int, prefix: int) -> tuple[Groups, float]:
    """Return which input tokens each output token holds, and the margin of the decisions."""
    rows = [[value / math.sqrt(sum(v * v for v in row)) for value in row] for row in metric]
    set_a = [i for i in range(prefix, len(rows)) if i % 2 == 0]
    set_b = [i for i in range(prefix, len(rows)) if i % 2 == 1]
    best = {}
    for a in set_a:
        similar = [(sum(x * y for x, y in zip(rows[a], rows[b], strict=True)), b) for b in set_b]
        best[a] = sorted(similar, reverse=True)
    ranked = sorted(set_a, key=lambda a: best[a][0][0], reverse=True)
    # The reference keeps the order of what is left only when there is a class token.
    rest = sorted(ranked[r:]) if prefix else ranked[r:]
    groups = [[i] for i in range(prefix)] + [[a] for a in rest]
    groups += [sorted([b] + [a for a in ranked[:r] if best[a][0][1] == b]) for b in set_b]

    gaps = [2.0]
    if len(set_b) > 1:  # which partner
        gaps += [best[a][0][0] - best[a][1][0] for a in ranked[:r]]
    # Which tokens merge; and without a prefix the order of the rest, which the next block sees.
    decided = ranked[r - 1 :] if prefix == 0 else ranked[r - 1 : r + 1]
    gaps += [best[a][0][0] - best[b][0][0] for a, b in itertools.pairwise(decided)]
    return groups, min(gaps)


def slow_merge(x: Tensor, size: Tensor, groups: Groups) -> tuple[Tensor, Tensor]:
    """Merge x [N, C] with sizes [N] into the mean of each group, weighted by size."""
    sizes = torch.stack([sum((size[i] for i in group), size.new_zeros(())) for group in groups])
    totals = [sum((x[i] * size[i] for i in group), x.new_zeros(())) for group in groups]
    return torch.stack(totals) / sizes[:, None], sizes


def slow_attention(q: Tensor, k: Tensor, v: Tensor, size: Tensor | None) -> Tensor:
    """Return softmax(q kᵀ / sqrt(d) + log size) v of q, k, v [H, N, d] and sizes [N]."""
    scores = q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])
    if size is not None:
        scores = scores + size.log()
    weights = scores.exp() / scores.exp().sum(dim=-1, keepdim=True)
    return weights @ v


def slow_forward(
    model: VisionTransformer, image: Tensor, removed: Sequence[int], proportional: bool = True
) -> tuple[Tensor, Tensor, list[int]]:
    """Return logits, final sizes and the final token of each input token of image [3, H, W]."""
    model = copy.deepcopy(model).double()
    x = model.norm_pre(model._pos_embed(model.patch_embed(image[None].double())))[0]
    prefix = model.num_prefix_tokens
    size = x.new_ones(x.shape[0])
    held = [[i] for i in range(x.shape[0])]
    for block, r in zip(model.blocks, removed, strict=True):
        attention, heads = block.attn, block.attn.num_heads
        width = x.shape[1]
        qkv = attention.qkv(block.norm1(x))
        q, k, v = (
            part.reshape(-1, heads, width // heads).transpose(0, 1)
            for part in (qkv[:, :width], qkv[:, width : 2 * width], qkv[:, 2 * width :])
        )
        q, k = attention.q_norm(q), attention.k_norm(k)
        y = slow_attention(q, k, v, size if proportional else None)
        x = x + block.ls1(attention.proj(y.transpose(0, 1).reshape(-1, width)))
        if r:
            groups, _ = slow_match(k.mean(dim=0).tolist(), r, prefix)
            x, size = slow_merge(x, size, groups)
            held = [[token for i in group for token in held[i]] for group in groups]
        x = x + block.ls2(block.mlp(block.norm2(x)))
    x = model.norm(x)

    source = [-1] * sum(len(tokens) for tokens in held)
    for out, tokens in enumerate(held):
        for token in tokens:
            source[token] = out
    if isinstance(model, VisionTransformerDistilled):
        logits = (model.head(x[0]) + model.head_dist(x[1])) / 2
    elif model.global_pool == "token":
        logits = model.head(model.fc_norm(x[0]))
    else:
        first = 0 if model.pool_include_prefix else prefix
        mean = sum(x[i] * size[i] for i in range(first, len(x))) / size[first:].sum()
        logits = model.head(model.fc_norm(mean))
    return logits, size, source
