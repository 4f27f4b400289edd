"""Weights of learned methods, drawn and not learned."""

import torch
from timm.models.vision_transformer import VisionTransformer

from tocom import Ladder, ReductionWeights


def drawn_weights(
    ladder: Ladder, model: VisionTransformer, seed: int = 0
) -> ReductionWeights | None:
    """Return the start of a ladder's method for a model, away from what is trivial.

    None: it learns nothing.
    """
    if not ladder.method.learns:
        return None
    torch.manual_seed(seed)
    start = ladder.start(len(model.blocks), model.embed_dim, model.patch_embed.grid_size)
    return ReductionWeights(
        ladder.method, {name: x + 0.05 * torch.randn_like(x) for name, x in start.items()}
    )
