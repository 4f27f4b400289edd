"""The forward of a timm Vision Transformer at a rate, with a delta.

A rate is an argument, not a state: the model is read, never written, so requests at
different rates share one set of weights and may run at once. timm's submodules are
called, no forward of theirs is copied; at rate 0 without a delta the answer is stock
timm's. Which models are supported is decided in `supported`.

Does not do: gradient checkpointing, attention masks, timm's intermediate features.
Reference: ToMe section 3; Token Compensator (ToCom), arXiv:2408.06798, section 3.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor

from tocom.adapter import Adapter
from tocom.attention import attend
from tocom.delta import AnyDelta, has_plain_mlp, linear
from tocom.merging import follow, match, merge
from tocom.schedule import Plan, Rate
from tocom.variant import Variant


def forward(
    model: VisionTransformer,
    images: Tensor,
    rate: Rate = 0,
    delta: AnyDelta | None = None,
    *,
    proportional: bool = True,
    adapter: Adapter | None = None,
) -> Tensor:
    """Return the logits [B, classes] of `images` at `rate`.

    Args:
        model: a supported timm ViT; not modified.
        images: [B, 3, H, W], normalised as the model wants.
        rate, delta, proportional, adapter: as in `Variant`.

    Raises:
        RateError: if the rate is malformed.
    """
    variant = Variant(rate, delta, adapter, proportional)
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
) -> Tensor:
    """Return the final tokens [B, M, D] of `images` at `rate`, after timm's last norm.

    Arguments and errors as in `forward`. M is `plan.tokens[-1]`, prefix tokens first.
    """
    variant = Variant(rate, delta, adapter, proportional)
    final: Tensor = model.norm(_last(run_blocks(model, embed(model, images), variant)).x)
    return final


@dataclass(frozen=True)
class Trace:
    """The answers to a batch and what happened to its tokens.

    Attributes:
        logits: [B, classes], those of `forward`.
        features: [B, D] what the head reads.
        plan: token counts of every block.
        size: [B, M, 1] input tokens that each final token stands for, in fp32.
        source: [B, N] the final token that holds each input token.
        margin: [B] by how much cosine similarity the closest merge decision was taken;
            below about 1e-6 another rounding may merge otherwise.
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
) -> Trace:
    """Run `forward` and note what happens to the tokens; arguments and errors as there."""
    variant = Variant(rate, delta, adapter, proportional)
    x = embed(model, images)
    last = _last(run_blocks(model, x, variant, trace=True))
    features, logits, _ = read(model, last.x, last.size)
    size = x.new_ones(*x.shape[:2], 1, dtype=torch.float32) if last.size is None else last.size
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
        images: [B, 3, H, W], normalised as the model wants.
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
    if not pools_patches(model) or size is None or model.global_pool != "avg":
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
    size: Tensor | None  # [B, M, 1] input tokens that each stands for; None: one each
    source: Tensor | None  # [B, N] the token that holds each input token; None: not traced
    margin: Tensor | None  # [B] of the closest merge decision so far; None: not traced


class Outputs(NamedTuple):
    """What a head reads and what it says."""

    features: Tensor  # [B, D]
    logits: Tensor  # [B, classes]
    states: tuple[State, ...] = ()  # after each block but the last, which the head reads


def outputs(model: VisionTransformer, x: Tensor, variant: Variant, trace: bool = False) -> Outputs:
    """Return features and logits of embedded tokens x [B, N, D].

    The logits of `forward` but for rounding, in less time: several calls share one `embed`, and
    of the last block only what the head reads is computed. With `trace` also the tokens on the
    way.
    """
    blocks = run_blocks(model, x, variant, trace, prefix_only=not pools_patches(model))
    *before, last = deque(blocks, maxlen=None if trace else 1)
    return read(model, last.x, last.size)._replace(states=tuple(before))


def run_blocks(
    model: VisionTransformer,
    x: Tensor,
    variant: Variant,
    trace: bool = False,
    prefix_only: bool = False,
) -> Iterator[State]:
    """Run the blocks on embedded tokens x [B, N, D] and yield the tokens after each.

    Args:
        model: a supported timm ViT.
        x: [B, N, D] what `embed` returned.
        variant: how to run them.
        trace: follow where the tokens go.
        prefix_only: compute only the prefix tokens of the last block, which is all that the
            head of a model without pooling reads.
    """
    batch, tokens, _ = x.shape
    plan, delta, adapter = variant.plan(model, tokens), variant.delta, variant.adapter
    size: Tensor | None = None
    source = torch.arange(tokens, device=x.device).expand(batch, tokens) if trace else None
    margin = x.new_full((batch,), 2.0, dtype=torch.float32) if trace else None
    for i, (block, removed) in enumerate(zip(model.blocks, plan.removed, strict=True)):
        bias = size if variant.proportional else None
        queries = plan.prefix if prefix_only and i == len(model.blocks) - 1 else None
        y, keys = attend(block.attn, f"blocks.{i}.attn", block.norm1(x), bias, delta, queries)
        x = x[:, :queries] + block.drop_path1(block.ls1(y))
        if removed and queries is None:
            mean = keys.mean(dim=1, dtype=torch.float32)  # not rounded where keys are
            merging = match(mean, removed, plan.prefix, margin=trace)
            x, size = merge(x, size, merging)
            if source is not None:
                source = follow(source, merging)
            if margin is not None and merging.margin is not None:
                margin = torch.minimum(margin, merging.margin)
        y = block.drop_path2(block.ls2(_mlp(block, f"blocks.{i}.mlp", block.norm2(x), delta)))
        x = x + y if adapter is None else x + y + adapter(i, x)
        yield State(x, size, source, margin)


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
