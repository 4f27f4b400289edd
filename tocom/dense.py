"""Features for every place of a picture: a grid [B, D, H / p, W / p] at any rate, of any picture.

Reduced tokens are given back to the grid: merged ones to each of their patches, soft ones by their
shares, and a patch that was dropped has the value that it had then. Pictures may be of other sizes
than the model's; its position embeddings are resampled as timm does it. Larger ones may be looked
at through windows.

Letters: B images, N tokens that entered the first block, M tokens that are left, p side of a patch.
Reference: unmerging as in Token Compensator (ToCom), arXiv:2408.06798, appendix; windows as in
Segmenter, arXiv:2105.05633, section 4.
"""

import copy
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from timm.layers import Format
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from tocom.adapter import Adapter
from tocom.delta import AnyDelta
from tocom.errors import ShapeError
from tocom.ladder import TOME, Ladder
from tocom.merging import spread
from tocom.reduction import Fate, ReductionWeights
from tocom.schedule import Rate
from tocom.variant import Variant
from tocom.vit import State, run_blocks
from tocom.vit import embed as embed_own

Size = tuple[int, int]


def forward_dense(
    model: VisionTransformer,
    images: Tensor,
    rate: Rate = 0,
    delta: AnyDelta | None = None,
    *,
    proportional: bool = True,
    adapter: Adapter | None = None,
    ladder: Ladder = TOME,
    learned: ReductionWeights | None = None,
    window: Size | None = None,
    stride: Size | None = None,
) -> Tensor:
    """Return the features [B, D, H / p, W / p] of every patch of `images`, after timm's last norm.

    Args:
        model: a supported timm ViT; not modified.
        images: [B, 3, H, W], normalised as the model wants, of whole patches.
        rate, delta, proportional, adapter, ladder, learned: as in `Variant`.
        window, stride: height and width in pixels; see `slide`. None: the picture at once.

    Raises:
        RateError: if the rate is malformed, or the ladder has no such rung.
        ReductionError: if the ladder is for another number of blocks, or its method needs weights
            and has none.
        ShapeError: if pictures, windows or strides are not of whole patches.
    """
    variant = Variant(rate, delta, adapter, proportional, ladder, learned)
    if window is None:
        return features(model, images, variant)
    patch: Size = model.patch_embed.patch_size
    check_windows(window, stride or window, patch)
    return slide(images, window, stride or window, lambda part: features(model, part, variant))


def features(model: VisionTransformer, images: Tensor, variant: Variant) -> Tensor:
    """Return the features [B, D, H / p, W / p] of images [B, 3, H, W], as `forward_dense` does.

    Raises:
        ShapeError: if the pictures are not of whole patches.
    """
    height, width = images.shape[-2:]
    patch: Size = model.patch_embed.patch_size
    if not height or not width or height % patch[0] or width % patch[1]:
        raise ShapeError(
            f"a picture for dense features has whole patches of {patch[0]} x {patch[1]} pixels, "
            f"got {height} x {width}"
        )
    grid = height // patch[0], width // patch[1]
    x = embed(model, images)
    plan = variant.plan(model, x.shape[1], grid)
    # Where no token leaves a block, there is nothing to follow.
    traced = any(plan.acts) and not plan.restored
    states = run_blocks(model, x, variant, trace=traced, grid=grid)
    final = model.norm(restore(states, x.shape[1]))
    patches: Tensor = final[:, model.num_prefix_tokens :].transpose(1, 2).unflatten(2, grid)
    return patches


def embed(model: VisionTransformer, images: Tensor) -> Tensor:
    """Return the tokens [B, N, D] that enter the first block, of pictures of any whole patches.

    Those of another size than the model's get its position embeddings resampled, as timm's
    `dynamic_img_size` does it.
    """
    if model.dynamic_img_size or tuple(images.shape[-2:]) == tuple(model.patch_embed.img_size):
        return embed_own(model, images)
    # Copies of two shells, whose weights are the model's own.
    resized, stem = copy.copy(model), copy.copy(model.patch_embed)
    stem.strict_img_size, stem.flatten, stem.output_fmt = False, False, Format.NHWC
    resized.dynamic_img_size = True
    resized._modules = {**model._modules, "patch_embed": stem}
    return embed_own(resized, images)


def restore(states: Iterable[State], tokens: int) -> Tensor:
    """Return a token for each that entered the first block: [B, N, D].

    Args:
        states: the tokens after each block, traced if any left.
        tokens: N.
    """
    source = shares = values = None
    for state in states:
        fate = state.fate
        if fate is None:
            continue
        assert fate.before is not None
        if source is None:
            source = torch.arange(tokens, device=state.x.device).expand(len(state.x), -1)
            values = fate.before.new_zeros(*source.shape, fate.before.shape[2])
        if shares is not None or fate.weight is not None:
            before = _shares(source, fate.before.shape[1]) if shares is None else shares
            step = _shares(fate.into, state.x.shape[1]) if fate.weight is None else fate.weight
            shares = before.to(step.dtype) @ step
            continue
        after = (fate if fate.dense is None else Fate(fate.dense)).follow(source)
        assert values is not None
        gone = ((after < 0) & (source >= 0)).unsqueeze(-1)
        values = torch.where(gone, spread(fate.before, source.clamp(min=0)), values)
        source = after
    if source is None:
        return state.x
    assert values is not None
    if shares is None:
        there = (source >= 0).unsqueeze(-1)
        return torch.where(there, spread(state.x, source.clamp(min=0)), values)
    # What part of a token was dropped on the way is not there to be shared.
    whole = shares.sum(dim=2, keepdim=True)
    mean = (shares / whole.clamp(min=torch.finfo(shares.dtype).tiny)).to(state.x.dtype) @ state.x
    return torch.where(whole > 0, mean, values)


def slide(images: Tensor, window: Size, stride: Size, run: Callable[[Tensor], Tensor]) -> Tensor:
    """Return the mean of what `run` makes of windows over the pictures.

    The last windows of a row or column end with the picture. Where it is smaller than a window,
    the window is as large as the picture.

    Args:
        images: [B, 3, H, W].
        window, stride: height and width in pixels.
        run: of [B, 3, h, w] returns [B, C, h / s, w / s], for one s that divides all starts.

    Returns:
        [B, C, H / s, W / s].
    """
    height, width = images.shape[-2:]
    high, wide = min(window[0], height), min(window[1], width)
    sums = counts = None
    for top in starts(height, high, stride[0]):
        for left in starts(width, wide, stride[1]):
            part = run(images[..., top : top + high, left : left + wide])
            scale = high // part.shape[-2]
            if sums is None:
                sums = part.new_zeros(*part.shape[:2], height // scale, width // scale)
                counts = torch.zeros_like(sums[:1, :1])
            assert counts is not None
            rows = slice(top // scale, (top + high) // scale)
            columns = slice(left // scale, (left + wide) // scale)
            sums[..., rows, columns] += part
            counts[..., rows, columns] += 1
    assert sums is not None
    assert counts is not None
    return sums / counts


def starts(length: int, window: int, stride: int) -> list[int]:
    """Return where windows begin: every `stride`, and one that ends with the picture."""
    found = list(range(0, length - window, stride))
    return [*found, length - window]


def check_windows(window: Size, stride: Size, patch: Size) -> None:
    """Raise ShapeError unless windows and strides are of whole patches, and miss nothing."""
    for name, size in (("window", window), ("stride", stride)):
        if any(each < side or each % side for each, side in zip(size, patch, strict=True)):
            raise ShapeError(
                f"a {name} has whole patches of {patch[0]} x {patch[1]} pixels, got "
                f"{size[0]} x {size[1]}"
            )
    if stride[0] > window[0] or stride[1] > window[1]:
        raise ShapeError(
            f"a stride of {stride[0]} x {stride[1]} pixels would leave gaps between windows of "
            f"{window[0]} x {window[1]}"
        )


def _shares(source: Tensor, tokens: int) -> Tensor:
    """Return [B, N, M] 1 for the token that holds each input token; dropped ones have none."""
    there = (source >= 0).unsqueeze(-1)
    return F.one_hot(source.clamp(min=0), tokens).masked_fill(~there, 0).float()
