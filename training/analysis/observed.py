"""What candidates do to the tokens of pictures.

Letters: P pictures, N patches, C channels.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tocom import ConfigError
from tocom.vit import State, embed, read, run_blocks
from training.analysis.tokens import kept
from training.ladders.candidates import Candidate
from training.measuring import Measurement
from training.pictures.batches import evaluation_batches
from training.screen.progress import Progress


@dataclass(frozen=True)
class Observed:
    """What one candidate does.

    Attributes:
        held: after each block that is looked at [P, N] the token that holds each patch; -1: none.
        features: likewise [C, P] what the class token holds; of a model without one, the mean of
            the patch tokens.
        depth: [rows, columns] the mean over the pictures of the block in which a patch ceases to be
            a token of its own; the number of blocks where it never does.
        figures: [P, 3] top-1, agreement with the model's own rung 0 and KL to it.
    """

    held: Sequence[Tensor]
    features: Sequence[Tensor]
    depth: Tensor
    figures: Tensor


@dataclass
class _Gathered:
    """The same, batch by batch."""

    held: list[list[Tensor]] = field(default_factory=list)
    features: list[list[Tensor]] = field(default_factory=list)
    depth: list[Tensor] = field(default_factory=list)
    figures: list[Tensor] = field(default_factory=list)

    def whole(self, grid: tuple[int, int]) -> Observed:
        return Observed(
            held=[torch.cat(block) for block in zip(*self.held, strict=True)],
            features=[torch.cat(block).T for block in zip(*self.features, strict=True)],
            depth=torch.cat(self.depth).double().mean(dim=0).reshape(grid),
            figures=torch.cat(self.figures),
        )


@torch.inference_mode()
def observe(
    measurement: Measurement, candidates: Sequence[Candidate], blocks: Sequence[int]
) -> list[Observed]:
    """Return what candidates of one model do; the first is its rung 0.

    Args:
        measurement: the model and its pictures.
        candidates: that run on it.
        blocks: after which tokens and features are looked at.
    """
    model = measurement.backbone.model
    device = next(model.parameters()).device
    gathered = [_Gathered() for _ in candidates]
    batches = evaluation_batches(
        measurement.backbone, [measurement.pictures], measurement.keys, measurement.batch_size,
        measurement.workers,
    )  # fmt: skip
    whole = measurement.count * sum(each.macs for each in candidates)
    with Progress(f"observing {measurement.backbone.name}", whole, "MAC") as bar:
        for images, folders in batches:
            tokens = embed(model, images.to(device))
            classes = None if measurement.classes is None else measurement.truth(folders)
            stock = None
            for candidate, seen in zip(candidates, gathered, strict=True):
                logits = _look(candidate, tokens, blocks, seen)
                stock = logits if stock is None else stock
                seen.figures.append(measurement.compare(logits, stock, classes))
                bar.update(len(images) * candidate.macs)
    return [each.whole(model.patch_embed.grid_size) for each in gathered]


def _look(candidate: Candidate, tokens: Tensor, blocks: Sequence[int], seen: _Gathered) -> Tensor:
    """Run a candidate on embedded tokens, note what it does and return its logits on the CPU."""
    model = candidate.backbone.model
    prefix = model.num_prefix_tokens
    held, features = [], []
    depth = torch.zeros(len(tokens), tokens.shape[1] - prefix)
    for i, state in enumerate(run_blocks(model, tokens, candidate.variant, trace=True)):
        assert state.source is not None
        where = state.source[:, prefix:].cpu()
        # Whoever is no token of its own never becomes one again.
        depth += kept(where)
        if i in blocks:
            held.append(where.short())
            features.append(_class_feature(state, model.has_class_token, prefix).float().cpu())
    seen.held.append(held)
    seen.features.append(features)
    seen.depth.append(depth)
    logits: Tensor = read(model, state.x, state.size).logits.float().cpu()
    return logits


def _class_feature(state: State, has_class: bool, prefix: int) -> Tensor:
    """Return what the class token holds [B, C], or the mean of the patch tokens."""
    if has_class:
        return state.x[:, 0]
    if state.size is None:
        return state.x[:, prefix:].mean(dim=1)
    size = state.size[:, prefix:]
    return (state.x[:, prefix:] * size).sum(dim=1) / size.sum(dim=1)


def looked_at(blocks: Sequence[int], model: Any, name: str) -> list[int]:
    """Return the blocks after which a model is looked at: those asked for, or its quarters.

    Raises:
        ConfigError: if it has no such block.
    """
    depth = len(model.blocks)
    if blocks and max(blocks) >= depth:
        raise ConfigError(f"blocks: {name} has the blocks 0 to {depth - 1}, got {max(blocks)}")
    quarters = (depth // 4, depth // 2, 3 * depth // 4, depth - 1)
    return sorted(set(blocks or quarters))
