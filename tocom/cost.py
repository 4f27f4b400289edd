"""Multiply-adds of a forward at a rate, in closed form: no image, no run.

Counts what the matrix units do: linear layers, attention products, the similarity matrix
of the matching. Does not count norms, activations, softmax, gathers.

Reference: the counting of ToMe's and DeiT's tables ("GFLOPs" there are multiply-adds).
"""

from dataclasses import dataclass

from timm.models.vision_transformer import VisionTransformer
from torch import nn

from tocom.schedule import Plan, Rate, plan


@dataclass(frozen=True)
class Cost:
    """What one image costs.

    Attributes:
        macs: multiply-adds of the whole forward.
        embedding: of the patch embedding.
        blocks: of each block.
        head: of the classifier.
        plan: token counts of every block.
    """

    macs: int
    embedding: int
    blocks: tuple[int, ...]
    head: int
    plan: Plan


def cost(
    model: VisionTransformer, rate: Rate = 0, image_size: tuple[int, int] | None = None
) -> Cost:
    """Return the multiply-adds of one image at `rate`.

    Args:
        model: a supported timm ViT.
        rate: see `forward`.
        image_size: (height, width) in pixels; default: the model's own. A delta costs nothing
            when it is folded and is not counted.

    Raises:
        RateError: if the rate is malformed.
    """
    size = image_size or tuple(model.patch_embed.img_size)
    rows, columns = model.patch_embed.dynamic_feat_size(size)
    patches = rows * columns
    prefix = model.num_prefix_tokens
    steps = plan(rate, len(model.blocks), patches + prefix, prefix)

    embedding = patches * model.patch_embed.proj.weight.numel()
    blocks = []
    tokens = steps.tokens_in
    for block, removed in zip(model.blocks, steps.removed, strict=True):
        attention = tokens * linear_macs(block.attn) + 2 * tokens**2 * block.attn.proj.in_features
        head_width = block.attn.proj.in_features // block.attn.num_heads
        matching = (tokens + 1) // 2 * (tokens // 2) * head_width if removed else 0
        tokens -= removed
        blocks.append(attention + matching + tokens * linear_macs(block.mlp))
    head = sum(linear_macs(module) for name, module in model.named_children() if "head" in name)
    total = embedding + sum(blocks) + head
    return Cost(macs=total, embedding=embedding, blocks=tuple(blocks), head=head, plan=steps)


def linear_macs(module: nn.Module) -> int:
    """Return the multiply-adds that the linear layers of `module` spend on one token."""
    return sum(layer.weight.numel() for layer in module.modules() if isinstance(layer, nn.Linear))
