"""The forward of a timm Vision Transformer at a rate, with a delta.

A rate is an argument, not a state: the model is read, never written, so requests at
different rates share one set of weights and may run at once. timm's submodules are
called, no forward of theirs is copied; at rate 0 without a delta the answer is stock
timm's. Which models are supported is decided in `supported`. timm's `set_grad_checkpointing` is
heeded: blocks then keep only what enters them, and are run again for their gradients.

Does not do: attention masks, timm's intermediate features.
Reference: ToMe section 3; Token Compensator (ToCom), arXiv:2408.06798, section 3.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tocom.adapter import Adapter
from tocom.attention import answer, look
from tocom.delta import AnyDelta, has_plain_mlp, linear
from tocom.ladder import TOME, Ladder, Plan
from tocom.merging import spread
from tocom.reduction import Cut, Fate, Place, ReductionWeights, Seen, Tokens
from tocom.schedule import Rate
from tocom.variant import Variant


def forward(
    model: VisionTransformer,
    images: Tensor,
    rate: Rate = 0,
    delta: AnyDelta | None = None,
    *,
    proportional: bool = True,
    adapter: Adapter | None = None,
    ladder: Ladder = TOME,
    learned: ReductionWeights | None = None,
) -> Tensor:
    """Return the logits [B, classes] of `images` at `rate`.

    Args:
        model: a supported timm ViT; not modified.
        images: [B, 3, H, W], normalised as the model wants.
        rate, delta, proportional, adapter, ladder, learned: as in `Variant`.

    Raises:
        RateError: if the rate is malformed, or the ladder has no such rung.
        ReductionError: if the ladder is for another number of blocks, or its method needs weights
            and has none.
    """
    variant = Variant(rate, delta, adapter, proportional, ladder, learned)
    last = _last(run_blocks(model, embed(model, images), variant))
    return head(model, model.norm(last.x), last.size)


def forward_features(
    model: VisionTransformer,
    images: Tensor,
    rate: Rate = 0,
    delta: AnyDelta | None = None,
    *,
    proportional: bool = True,
    adapter: Adapter | None = None,
    ladder: Ladder = TOME,
    learned: ReductionWeights | None = None,
) -> Tensor:
    """Return the final tokens [B, M, D] of `images` at `rate`, after timm's last norm.

    Arguments and errors as in `forward`. M is `plan.tokens[-1]`, prefix tokens first. Of methods
    that decide by picture some tokens may be padding; the sizes in `trace` say which.
    """
    variant = Variant(rate, delta, adapter, proportional, ladder, learned)
    final: Tensor = model.norm(_last(run_blocks(model, embed(model, images), variant)).x)
    return final


@dataclass(frozen=True)
class Trace:
    """The answers to a batch and what happened to its tokens.

    Attributes:
        logits: [B, classes], those of `forward`.
        features: [B, D] what the head reads.
        plan: token counts of every block.
        size: [B, M, 1] input tokens that each final token stands for, in fp32; 0: padding, with
            methods that decide by picture; of methods that do not count, 1.
        source: [B, N] the final token that holds each input token; -1: it was dropped.
        margin: [B] by how much the closest decision was taken, for ToMe by how much cosine
            similarity; below about 1e-6 another rounding may decide otherwise.
    """

    logits: Tensor
    features: Tensor
    plan: Plan
    size: Tensor
    source: Tensor
    margin: Tensor


def trace(
    model: VisionTransformer,
    images: Tensor,
    rate: Rate = 0,
    delta: AnyDelta | None = None,
    *,
    proportional: bool = True,
    adapter: Adapter | None = None,
    ladder: Ladder = TOME,
    learned: ReductionWeights | None = None,
) -> Trace:
    """Run `forward` and note what happens to the tokens; arguments and errors as there."""
    variant = Variant(rate, delta, adapter, proportional, ladder, learned)
    x = embed(model, images)
    last = _last(run_blocks(model, x, variant, trace=True))
    features, logits, _ = read(model, last.x, last.size)
    size = last.x.new_ones(*last.x.shape[:2], 1).float() if last.size is None else last.size
    assert last.source is not None
    assert last.margin is not None
    return Trace(
        logits=logits,
        features=features,
        plan=variant.plan(model, x.shape[1]),
        size=size,
        source=last.source,
        margin=last.margin,
    )


def embed(model: VisionTransformer, images: Tensor) -> Tensor:
    """Return the tokens [B, N, D] that enter the first block, whatever the rate.

    Args:
        model: a supported timm ViT.
        images: [B, 3, H, W], normalised as the model wants; of its own size, see `dense.embed`.
    """
    x: Tensor = model._pos_embed(model.patch_embed(images))  # timm has no public name for it
    tokens: Tensor = model.norm_pre(model.patch_drop(x))
    return tokens


def pool(model: VisionTransformer, x: Tensor, size: Tensor | None) -> Tensor:
    """Return the features [B, D] that the head reads, of final tokens and their sizes.

    Args:
        model: a supported timm ViT; of one with two heads, the mean of what they read.
        x: [B, M, D] tokens after the last norm.
        size: [B, M, 1] input tokens that each stands for; None: one each.
    """
    features: Tensor
    if not pools_patches(model) or size is None:
        features = model.forward_head(x, pre_logits=True)
        return features
    first = 0 if model.pool_include_prefix else model.num_prefix_tokens
    weight = size[:, first:] / size[:, first:].sum(dim=1, keepdim=True)
    # A merged token stands for all of its patches, so it weighs as many in the mean.
    pooled = (x[:, first:] * weight).sum(dim=1).to(x.dtype)
    features = model.head_drop(model.fc_norm(pooled))
    return features


def head(model: VisionTransformer, x: Tensor, size: Tensor | None) -> Tensor:
    """Return the logits [B, classes] of final tokens x [B, M, D] with sizes [B, M, 1]."""
    logits: Tensor
    if isinstance(model, VisionTransformerDistilled):
        logits = model.forward_head(x)
    else:
        logits = model.head(pool(model, x, size))
    return logits


def read(model: VisionTransformer, x: Tensor, size: Tensor | None) -> "Outputs":
    """Return features and logits of the tokens x [B, M, D] after the last block.

    Of a model without pooling the prefix tokens are enough; sizes as in `pool`.
    """
    final = model.norm(x)
    return Outputs(pool(model, final, size), head(model, final, size))


def pools_patches(model: VisionTransformer) -> bool:
    """Return whether the head reads patch tokens, not prefix tokens alone."""
    return not isinstance(model, VisionTransformerDistilled) and model.global_pool != "token"


class State(NamedTuple):
    """The tokens after a block.

    Letters: B images, N tokens that entered the first block, M tokens that are left.
    """

    x: Tensor  # [B, M, D]
    size: Tensor | None  # [B, M, 1] input tokens that each stands for, 0: padding; None: one each
    source: Tensor | None  # [B, N] the token that holds each input token, -1: none; None: no trace
    margin: Tensor | None  # [B] of the closest decision so far; None: not traced
    fate: Fate | None = None  # where its tokens went in this block, if they did and it is traced


class Outputs(NamedTuple):
    """What a head reads and what it says."""

    features: Tensor  # [B, D]
    logits: Tensor  # [B, classes]
    states: tuple[State, ...] = ()  # after each block; the last one's only if it is whole


def outputs(
    model: VisionTransformer,
    x: Tensor,
    variant: Variant,
    trace: bool = False,
    whole: bool = False,
) -> Outputs:
    """Return features and logits of embedded tokens x [B, N, D].

    The logits of `forward` but for rounding, in less time: several calls share one `embed`, and
    of the last block only what the head reads is computed. With `trace` also the tokens on the
    way; with `whole` all tokens of the last block, too.
    """
    prefix_only = not whole and not pools_patches(model)
    blocks = run_blocks(model, x, variant, trace, prefix_only)
    # Fates hold the tokens as they were, which nobody reads here.
    states = (state._replace(fate=None) for state in blocks)
    *before, last = deque(states, maxlen=None if trace else 1)
    states_on_the_way = (*before, last) if trace and whole else tuple(before)
    return read(model, last.x, last.size)._replace(states=states_on_the_way)


def run_blocks(
    model: VisionTransformer,
    x: Tensor,
    variant: Variant,
    trace: bool = False,
    prefix_only: bool = False,
    grid: tuple[int, int] | None = None,
) -> Iterator[State]:
    """Run the blocks on embedded tokens x [B, N, D] and yield the tokens after each.

    Args:
        model: a supported timm ViT.
        x: [B, N, D] what `embed` returned.
        variant: how to run them.
        trace: follow where the tokens go.
        prefix_only: compute only the prefix tokens of the last block, which is all that the
            head of a model without pooling reads.
        grid: rows and columns of patches; None: the model's own, if they are as many.
    """
    batch, count, _ = x.shape
    plan = variant.plan(model, count, grid)
    tokens, seen = Tokens(x), None
    source = torch.arange(count, device=x.device).expand(batch, count) if trace else None
    margin = x.new_full((batch,), 2.0, dtype=torch.float32) if trace else None
    again = model.grad_checkpointing and torch.is_grad_enabled()
    run = partial(checkpoint, _run_block, use_reentrant=False) if again else _run_block
    for i, (block, cut) in enumerate(zip(model.blocks, variant.cuts(plan, trace), strict=True)):
        queries = plan.prefix if prefix_only and i == len(model.blocks) - 1 else None
        tokens, seen, fate = run(block, i, tokens, seen, variant, cut, trace, queries)
        if variant.ladder.method.place is not Place.INPUT:
            seen = None  # nobody reads it, and a block that is run again would keep it
        if source is not None and fate is not None:
            source = fate.follow(source)
        if margin is not None and fate is not None and fate.margin is not None:
            margin = torch.minimum(margin, fate.margin)
        yield State(tokens.x, _counted(tokens), source, margin, fate if trace else None)


def _run_block(
    block: Block,
    i: int,
    tokens: Tokens,
    seen: Seen | None,
    variant: Variant,
    cut: Cut | None,
    trace: bool,
    queries: int | None,
) -> tuple[Tokens, Seen, Fate | None]:
    """Run block `i` on tokens; `seen` is of the block before.

    Returns:
        The tokens, what its attention saw, and where tokens went, if they did and it is traced.
    """
    method, delta, adapter = variant.ladder.method, variant.delta, variant.adapter
    # Where only prefix tokens are computed, nothing is left to reduce but what attention sees.
    acts = cut is not None and (queries is None or method.place is Place.INPUT)
    place = method.place if acts else None
    fate, rows, before = None, None, tokens.x
    if place is Place.INPUT:
        assert cut is not None
        tokens, fate = method.reduce(tokens, seen, cut)
    x, size, live = tokens
    seen = look(
        block.attn,
        f"blocks.{i}.attn",
        block.norm1(x),
        size if variant.proportional else None,
        delta,
        live=live,
        queries=queries,
    )
    if place is Place.ATTENTION:
        assert cut is not None
        chosen = method.choose(tokens, seen, cut)
        fate = chosen.fate(x.shape[1]) if trace else None
        rows, live = chosen.rows, chosen.live
        x = x.gather(1, rows.unsqueeze(-1).expand(-1, -1, x.shape[2]))
    y = answer(block.attn, f"blocks.{i}.attn", seen, delta, rows)
    tokens = whole = Tokens(x[:, :queries] + block.drop_path1(block.ls1(y)), size, live)
    if place in (Place.BETWEEN, Place.MLP):
        assert cut is not None
        before = tokens.x
        tokens, fate = method.reduce(tokens, seen, cut)
    x = tokens.x
    y = block.drop_path2(block.ls2(_mlp(block, f"blocks.{i}.mlp", block.norm2(x), delta)))
    if place is Place.MLP:
        assert fate is not None
        y = y if adapter is None else y + adapter(i, x)
        # What is added is that of the merged tokens; each token stays itself.
        tokens = whole._replace(x=whole.x + spread(y, fate.into))
        return tokens, seen, fate.undone() if trace else None
    tokens = tokens._replace(x=x + y if adapter is None else x + y + adapter(i, x))
    return tokens, seen, fate if fate is None else fate._replace(before=before)


def _counted(tokens: Tokens) -> Tensor | None:
    """Return the sizes of tokens, where padding counts nothing."""
    if tokens.live is None:
        return tokens.size
    live = tokens.live.unsqueeze(-1).float()
    return live if tokens.size is None else live * tokens.size


def _last(states: Iterator[State]) -> State:
    return deque(states, maxlen=1).pop()  # the others are not kept


def _mlp(block: Block, name: str, x: Tensor, delta: AnyDelta | None) -> Tensor:
    mlp = block.mlp
    y: Tensor
    if delta is None or not has_plain_mlp(block):  # other MLPs take no delta: check_delta says so
        y = mlp(x)
        return y
    hidden = mlp.drop1(mlp.act(linear(mlp.fc1, f"{name}.fc1", x, delta)))
    y = mlp.drop2(linear(mlp.fc2, f"{name}.fc2", mlp.norm(hidden), delta))
    return y
