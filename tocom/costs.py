"""Multiply-adds of a forward at a rate, in closed form: no image, no run.

Counts what the matrix units do: linear layers, attention products, the similarity matrix
of the matching. Does not count norms, activations, softmax, gathers.

Reference: the counting of ToMe's and DeiT's tables ("GFLOPs" there are multiply-adds).
"""

from dataclasses import dataclass

from timm.models.vision_transformer import Block, VisionTransformer
from torch import nn

from tocom.adapter import Adapter
from tocom.ladder import TOME, Ladder, Plan
from tocom.pruned import widths
from tocom.reduction import Heads, Method, Place
from tocom.schedule import Rate


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
    model: VisionTransformer,
    rate: Rate = 0,
    image_size: tuple[int, int] | None = None,
    *,
    ladder: Ladder = TOME,
    adapter: Adapter | None = None,
) -> Cost:
    """Return the multiply-adds of one image at `rate`.

    Args:
        model: a supported timm ViT.
        rate: see `forward`.
        image_size: (height, width) in pixels; default: the model's own. A delta costs nothing
            when it is folded and is not counted.
        ladder: what the rate means. Of methods that decide by picture it is the most.
        adapter: a task's branches beside the MLPs; None: it runs without.

    Raises:
        RateError: if the rate is malformed, or the ladder has no such rung.
        ReductionError: if the ladder is for another number of blocks.
    """
    size = image_size or tuple(model.patch_embed.img_size)
    rows, columns = model.patch_embed.dynamic_feat_size(size)
    patches = rows * columns
    prefix = model.num_prefix_tokens
    plan = ladder.plan(rate, len(model.blocks), patches + prefix, prefix, (rows, columns))

    embedding = patches * model.patch_embed.proj.weight.numel()
    blocks = []
    tokens = plan.tokens_in
    counts = zip(plan.reduced, plan.tokens, plan.acts, strict=True)
    for block, (reduced, leaving, acts) in zip(model.blocks, counts, strict=True):
        macs = _block_macs(block, ladder.method if acts else None, tokens, reduced, prefix)
        beside = 0 if adapter is None else 2 * adapter.bottleneck * model.embed_dim
        blocks.append(macs + reduced * beside)
        tokens = leaving
    head = sum(linear_macs(module) for name, module in model.named_children() if "head" in name)
    total = embedding + sum(blocks) + head
    return Cost(macs=total, embedding=embedding, blocks=tuple(blocks), head=head, plan=plan)


def _block_macs(block: Block, method: Method | None, tokens: int, leaving: int, prefix: int) -> int:
    """Return the multiply-adds of a block that `tokens` enter, `leaving` of them up to its MLP.

    Both with the prefix tokens, of which there are `prefix`.
    """
    attention, width = block.attn, block.attn.proj.out_features
    queries, _, values = widths(attention.qkv)
    place = None if method is None else method.place
    seen = leaving if place is Place.INPUT else tokens
    answered = leaving if place is Place.ATTENTION else seen
    macs: int = seen * linear_macs(attention.qkv) + answered * linear_macs(attention.proj)
    macs += (queries + values) * seen * answered + leaving * linear_macs(block.mlp)
    if method is not None:
        heads = Heads(attention.num_heads, queries // attention.num_heads)
        macs += method.macs(tokens, leaving, width, heads)
        macs += method.learned_macs(tokens - prefix, leaving - prefix, width)
    return macs


def linear_macs(module: nn.Module) -> int:
    """Return the multiply-adds that the linear layers of `module` spend on one token."""
    return sum(layer.weight.numel() for layer in module.modules() if isinstance(layer, nn.Linear))
