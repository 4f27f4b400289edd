"""What the tests of the methods share: a forward that is counted, and slow, obvious parts."""

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from tocom import forward
from tocom.ladder import Ladder
from tocom.reduction import Method, Seen


def of_all_blocks(method: Method, amount: int, patches: int, depth: int = 3) -> Ladder:
    """Return a ladder whose rung 1 says the same of every block."""
    return Ladder(method.name, method, ((0,) * depth, (amount,) * depth), patches)


def counted(model: VisionTransformer, ladder: Ladder) -> float:
    """Return the multiply-adds of rung 1 on one picture, as PyTorch counts them."""
    images = torch.zeros(1, 3, *model.patch_embed.img_size)
    for block in model.blocks:
        block.attn.fused_attn = False  # as two products, which every version counts
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        forward(model, images, 1, ladder=ladder)
    return counter.get_total_flops() / 2


def seen_at_random(
    generator: torch.Generator, batch: int, heads: int, tokens: int, width: int
) -> Seen:
    """Return queries, keys and values drawn at random, and sizes as a bias."""

    def draw() -> Tensor:
        return torch.randn(batch, heads, tokens, width, generator=generator)

    sizes = torch.randint(1, 9, (batch, 1, 1, tokens), generator=generator)
    return Seen(draw(), draw(), draw(), sizes.float().log(), width**-0.5)


def slow_attention_of(seen: Seen, image: int) -> Tensor:
    """Return the attention [N, N] of one image, mean over the heads, row by row in float64."""
    total = 0
    for q, k in zip(seen.q[image].double(), seen.k[image].double(), strict=True):
        scores = torch.stack([(row * k).sum(dim=1) for row in q]) * seen.scale
        scores = scores + (0 if seen.bias is None else seen.bias[image].double().flatten())
        total = total + scores.exp() / scores.exp().sum(dim=1, keepdim=True)
    return total / seen.q.shape[1]
