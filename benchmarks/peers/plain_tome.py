"""ToMe as its paper writes it, on timm's modules: what the forward here is measured against.

Attention is spelled out so that keys and scores are at hand, and tokens are gathered and
scattered element by element. The authors' own package is measured beside it where it is installed.

Reference: ToMe, arXiv:2210.09461, section 3 and appendix D.
"""

import math

import torch
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor


def plain_tome(model: VisionTransformer, images: Tensor, rate: int) -> Tensor:
    """Return the logits [B, classes] of images [B, 3, H, W], `rate` tokens merged a block.

    For models with one prefix token, which is all that the head reads.
    """
    x = model._pos_embed(model.patch_embed(images))
    size = x.new_ones(*x.shape[:2], 1)
    for block in model.blocks:
        x, size = _block(block, x, size, rate)
    return model.forward_head(model.norm(x))


def _block(block: Block, x: Tensor, size: Tensor, rate: int) -> tuple[Tensor, Tensor]:
    batch, tokens, width = x.shape
    attention = block.attn
    heads = attention.num_heads
    qkv = attention.qkv(block.norm1(x)).reshape(batch, tokens, 3, heads, width // heads)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    scores = (q * attention.scale) @ k.transpose(-2, -1)
    scores = scores + size.log()[:, None, None, :, 0]
    y = (scores.softmax(dim=-1) @ v).transpose(1, 2).reshape(batch, tokens, width)
    x = x + attention.proj(y)
    removed = min(rate, (tokens - 1) // 2)
    if removed:
        x, size = _merge(x, size, k.mean(1), removed)
    return x + block.mlp(block.norm2(x)), size


def _merge(x: Tensor, size: Tensor, metric: Tensor, removed: int) -> tuple[Tensor, Tensor]:
    metric = metric / metric.norm(dim=-1, keepdim=True)
    scores = metric[:, ::2] @ metric[:, 1::2].transpose(-1, -2)
    scores[:, 0] = -math.inf
    best, partner = scores.max(dim=-1)
    order = best.argsort(dim=-1, descending=True)[..., None]
    kept, merged = order[:, removed:].sort(dim=1).values, order[:, :removed]
    into = partner[..., None].gather(-2, merged)

    def summed(t: Tensor) -> Tensor:
        batch, _, width = t.shape
        a, b = t[:, ::2], t[:, 1::2]
        rest = a.gather(-2, kept.expand(batch, -1, width))
        moved = a.gather(-2, merged.expand(batch, -1, width))
        b = b.scatter_reduce(-2, into.expand(batch, -1, width), moved, reduce="sum")
        return torch.cat([rest, b], dim=1)

    total, size = summed(x * size), summed(size)
    return total / size, size
