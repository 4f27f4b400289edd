"""Attention of a timm block with the size bias, and with a delta.

timm's own submodules do the work; only their order is written here, because the forward
needs what attention saw (for the methods) and the bias (merged tokens count as many).

Reference: ToMe section 3, "tracking token size": softmax(q kᵀ / sqrt(d) + log size).
"""

import torch
import torch.nn.functional as F
from timm.layers import Attention
from torch import Tensor

from tocom.delta import AnyDelta, linear
from tocom.pruned import split
from tocom.reduction import Seen


def look(
    attention: Attention,
    name: str,
    x: Tensor,
    size: Tensor | None,
    delta: AnyDelta | None,
    *,
    live: Tensor | None = None,
    queries: int | None = None,
) -> Seen:
    """Return the queries, keys and values of a timm attention layer.

    Args:
        attention: the layer.
        name: its name in the model, such as `blocks.0.attn`.
        x: [B, N, D] normalised tokens.
        size: [B, N, 1] for proportional attention; None: all tokens count alike.
        delta: the change of its weights.
        live: [B, N] False: padding, which no token attends to; None: all are tokens.
        queries: queries only of the first so many tokens; None: of all.
    """
    batch, tokens, _ = x.shape
    q, k, v = split(attention, linear(attention.qkv, f"{name}.qkv", x, delta))
    q, k = attention.q_norm(q[:, :, :queries]), attention.k_norm(k)

    bias = None if size is None else size.log().to(q.dtype).reshape(batch, 1, 1, tokens)
    if live is not None:
        bias = q.new_zeros(batch, 1, 1, tokens) if bias is None else bias
        bias = bias.masked_fill(~live[:, None, None], -torch.inf)
    # As timm has it: what the layer's own scale says counts in its unfused branch alone.
    scale = attention.head_dim**-0.5 if attention.fused_attn else attention.scale
    return Seen(q, k, v, bias, scale)


def answer(
    attention: Attention,
    name: str,
    seen: Seen,
    delta: AnyDelta | None,
    rows: Tensor | None = None,
) -> Tensor:
    """Return the output of a timm attention layer.

    Args:
        attention: the layer.
        name: its name in the model.
        seen: what `look` returned.
        delta: the change of its weights.
        rows: [B, M] the positions of the queries that are answered; None: all.

    Returns:
        [B, M, D], one row a query.
    """
    q, k, v, bias = seen.q, seen.k, seen.v, seen.bias
    if rows is not None:
        q = q.gather(2, rows[:, None, :, None].expand(-1, q.shape[1], -1, q.shape[3]))
    if attention.fused_attn:
        dropout = attention.attn_drop.p if attention.training else 0.0
        channels = v.shape[-1]
        if (more := q.shape[-1] - channels) > 0:
            # Of a pruned model. Torch has fast kernels for one width alone, and zeros add nothing.
            v = F.pad(v, (0, more))
        elif more < 0:
            q, k = F.pad(q, (0, -more)), F.pad(k, (0, -more))
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=bias, dropout_p=dropout, scale=seen.scale
        )[..., :channels]
    else:
        scores = (q * attention.scale) @ k.transpose(-2, -1)
        scores = scores if bias is None else scores + bias
        y = attention.attn_drop(scores.softmax(dim=-1)) @ v

    return project(attention, name, y, delta)


def project(attention: Attention, name: str, y: Tensor, delta: AnyDelta | None) -> Tensor:
    """Return the output [B, M, D] of a timm attention layer of what its heads read.

    Args:
        attention: the layer.
        name: its name in the model.
        y: [B, H, M, d] the values that each head read.
        delta: the change of its weights.
    """
    y = attention.norm(y.transpose(1, 2).flatten(2))
    y = linear(attention.proj, f"{name}.proj", y, delta)
    projected: Tensor = attention.proj_drop(y)
    return projected
