"""Attention of a timm block with the size bias, and with a delta.

timm's own submodules do the work; only their order is written here, because the forward
needs the keys (for matching) and the bias (merged tokens count as many).

Reference: ToMe section 3, "tracking token size": softmax(q kᵀ / sqrt(d) + log size).
"""

import torch.nn.functional as F
from timm.layers import Attention
from torch import Tensor

from tocom.delta import AnyDelta, linear


def attend(
    attention: Attention,
    name: str,
    x: Tensor,
    size: Tensor | None,
    delta: AnyDelta | None,
    queries: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Run a timm attention layer.

    Args:
        attention: the layer.
        name: its name in the model, such as `blocks.0.attn`.
        x: [B, N, D] normalised tokens.
        size: [B, N, 1] for proportional attention; None: all tokens count alike.
        delta: the change of its weights.
        queries: answer only for the first so many tokens; None: for all.

    Returns:
        The output [B, N, D], or [B, queries, D], and the keys [B, H, N, D / H].
    """
    batch, tokens, _ = x.shape
    heads = attention.num_heads
    qkv = linear(attention.qkv, f"{name}.qkv", x, delta)
    qkv = qkv.reshape(batch, tokens, 3, heads, attention.head_dim).permute(2, 0, 3, 1, 4)
    q, k, v = qkv.unbind(0)
    q, k = attention.q_norm(q[:, :, :queries]), attention.k_norm(k)

    bias = None if size is None else size.log().to(q.dtype).reshape(batch, 1, 1, tokens)
    if attention.fused_attn:
        # Without `attention.scale`, as in timm: what it says counts in the other branch alone.
        dropout = attention.attn_drop.p if attention.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout)
    else:
        scores = (q * attention.scale) @ k.transpose(-2, -1)
        scores = scores if bias is None else scores + bias
        y = attention.attn_drop(scores.softmax(dim=-1)) @ v

    y = attention.norm(y.transpose(1, 2).flatten(2))
    y = linear(attention.proj, f"{name}.proj", y, delta)
    return attention.proj_drop(y), k
