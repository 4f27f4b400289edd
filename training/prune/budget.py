"""The multiply-adds that go with each channel at the rate that is pruned for."""

from tocom import Backbone, ConfigError, Ladder, Variant, cost
from tocom.reduction import Place
from training.prune.selection import Freed


def freed_by(backbone: Backbone, ladder: Ladder, rate: int) -> Freed:
    """Return what one channel of each block frees at a rate.

    What the reduction of tokens itself saves is not counted: it comes on top.
    """
    model = backbone.model
    tokens = model.patch_embed.num_patches + model.num_prefix_tokens
    plan = Variant(rate, ladder=ladder).plan(model, tokens)
    width, freed = model.embed_dim, Freed([], [], [])
    for reduced, leaving, acts in zip(plan.reduced, plan.tokens, plan.acts, strict=True):
        place = ladder.method.place if acts else None
        seen = reduced if place is Place.INPUT else tokens
        answered = reduced if place is Place.ATTENTION else seen
        freed.qk.append(2 * seen * width + seen * answered)
        freed.v.append((seen + answered) * width + seen * answered)
        freed.fc1.append(2 * reduced * width)
        tokens = leaving
    return freed


def wanted_macs(backbone: Backbone, ladder: Ladder, rate: int, target: float) -> float:
    """Return the multiply-adds that a share of all of them is.

    Raises:
        ConfigError: if so many cannot go.
    """
    macs = cost(backbone.model, rate, ladder=ladder).macs
    freed = freed_by(backbone, ladder, rate)
    most = 0
    for i, block in enumerate(backbone.model.blocks):
        heads, width = block.attn.num_heads, block.attn.head_dim
        most += heads * (width - 1) * (freed.qk[i] + freed.v[i])
        most += (block.mlp.fc1.out_features - 1) * freed.fc1[i]
    if target * macs > most:
        raise ConfigError(
            f"target={target:g}: of {backbone.name} at most {most / macs:.3f} of the multiply-adds "
            "can go with channels"
        )
    return target * macs
