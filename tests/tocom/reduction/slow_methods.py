"""What the tests of the methods share: a forward that is counted, and slow, obvious parts."""

from collections.abc import Callable

import torch
from hypothesis import strategies as st
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from tocom import forward
from tocom.ladder import Ladder
from tocom.reduction import Cut, Method, Seen


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


@st.composite
def cuts(draw: st.DrawFn, most: Callable[[int], int]) -> tuple[Tensor, Tensor, Seen, Cut]:
    """Tokens [B, N, 3], sizes [B, N, 1], what attention saw of them, and a cut that is traced.

    `most` says how many of so many patches can leave.
    """
    prefix, patches = draw(st.integers(1, 5)), draw(st.integers(2, 20))
    removed = draw(st.integers(1, most(patches)))
    batch, count = draw(st.integers(1, 3)), prefix + patches
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    x = torch.randn(batch, count, 3, generator=generator)
    seen = seen_at_random(generator, batch, heads=2, tokens=count, width=4)
    sizes = torch.randint(1, 9, (batch, count, 1), generator=generator).float()
    return x, sizes, seen, Cut(0, prefix, count - removed, (1, patches), trace=True)


def one_image(seen: Seen, image: int) -> Seen:
    """Return what was seen of one image, with nothing of the others."""
    one = slice(image, image + 1)
    bias = None if seen.bias is None else seen.bias[one]
    return Seen(seen.q[one], seen.k[one], seen.v[one], bias, seen.scale)


def slow_means(
    x: Tensor, weight: Tensor, sizes: Tensor, groups: list[list[int]]
) -> tuple[Tensor, Tensor]:
    """Return the weighted mean of each group of tokens x [N, C], and the sum of its sizes."""
    x, weight, sizes = x.double(), weight.double(), sizes.double()
    means = [sum(x[i] * weight[i] for i in group) / weight[group].sum() for group in groups]
    return torch.stack(means), torch.stack([sizes[group].sum() for group in groups])
