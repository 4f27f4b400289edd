"""The weights of a learned method as parameters, and at which rungs they learn.

They are for all rungs of a ladder, so all rungs take part: half of the micro-batches run at the
source rate, the others at another rung at random. DynamicViT learns at the source rate alone: its
scores are for any number of tokens, and it is told how many to keep.
"""

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from adapters.ladder import digest
from tocom import Backbone, ConfigError, Ladder, ReductionWeights
from tocom.reduction import DynamicViT
from training.seeds import derive


class LearnedWeights(nn.Module):
    """What a method learns for a model."""

    def __init__(self, ladder: Ladder, backbone: Backbone) -> None:
        """Begin as the method does, or as the backbone does if it was tuned on the same ladder."""
        super().__init__()
        self.method = ladder.method
        if backbone.learned is not None and digest(backbone.ladder) == digest(ladder):
            start = dict(backbone.learned.tensors)
        else:
            model = backbone.model
            start = ladder.start(len(model.blocks), model.embed_dim, model.patch_embed.grid_size)
        # Keys of a ParameterDict hold no dots.
        self.tensors = nn.ParameterDict(
            {name.replace(".", "/"): nn.Parameter(x.clone()) for name, x in start.items()}
        )

    def forward(self) -> ReductionWeights:
        """Return the weights, through which gradients reach the parameters."""
        tensors = {name.replace("/", "."): each for name, each in self.tensors.items()}
        return ReductionWeights(self.method, tensors)


def check_learns(ladder: Ladder, source: int, model: VisionTransformer) -> None:
    """Check that a method that learns can do so at a source rate.

    Raises:
        ConfigError: if it learns otherwise, acts nowhere there, or would stay unlearned in a block
            of another rung.
    """
    method = ladder.method
    if not method.learns:
        return
    if method.in_bank:
        raise ConfigError(
            f"the method {method.name!r} learns without labels, as part of a bank: distil one "
            "(tocom-train distill) for the tuned model, whose source is rate 0"
        )
    if source == 0:
        raise ConfigError(
            f"the method {method.name!r} learns nothing at rate 0, the stock model: source must be "
            f"1 to {ladder.top}"
        )
    if not isinstance(method, DynamicViT):
        return
    tokens = model.patch_embed.num_patches + model.num_prefix_tokens
    plans = [
        ladder.plan(rung, len(model.blocks), tokens, model.num_prefix_tokens)
        for rung in range((ladder.top or 0) + 1)
    ]
    for rung, plan in enumerate(plans):
        for block, (acts, learns) in enumerate(zip(plan.acts, plans[source].acts, strict=True)):
            if acts and not learns:
                raise ConfigError(
                    f"rung {rung} of the ladder {ladder.name!r} drops tokens in block {block}, for "
                    f"which {method.name} learns nothing at the source rate {source}: choose a "
                    "ladder whose rungs act in the same blocks"
                )


def shares_left(ladder: Ladder, source: int, model: VisionTransformer) -> list[float]:
    """Return the share of all patch tokens that is to be left after each block that acts."""
    prefix, patches = model.num_prefix_tokens, model.patch_embed.num_patches
    plan = ladder.plan(source, len(model.blocks), prefix + patches, prefix)
    return [
        (left - prefix) / patches for left, acts in zip(plan.tokens, plan.acts, strict=True) if acts
    ]


def drawn_rung(ladder: Ladder, source: int, seed: int, micro: int) -> int:
    """Return the rung at which a micro-batch is run: see the module."""
    others = [rung for rung in range(1, (ladder.top or 0) + 1) if rung != source]
    if not ladder.method.learns or isinstance(ladder.method, DynamicViT) or not others:
        return source
    generator = torch.Generator().manual_seed(derive(seed, "rung", micro))
    drawn = int(torch.randint(2 * len(others), (), generator=generator))
    return others[drawn] if drawn < len(others) else source
