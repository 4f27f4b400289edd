"""The metric of a bank: which tokens are alike, learned without labels beside the plug-ins.

In a share of the micro-batches the metric learns: the students, from the stock model, merge softly
(see `soft`) and have no plug-ins. In the others the plug-ins learn, and all merge as they will when
the bank is used, by the metric as it is by then.

Reference: Decoupled Token Embedding for Merging (DTEM), arXiv:2412.10569, section 3, where it
learns from labels and begins at random. Distilling it, and how it begins, are ours.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from adapters.ladder import REDUCTION
from tocom import ConfigError, Ladder, ReductionWeights, Variant
from tocom.reduction import DTEM, ToMe, options_of
from tocom.vit import embed, outputs
from training.config import MetricConfig
from training.learned.soft import SoftDTEM
from training.seeds import derive


def metric_ladder(ladder: Ladder, config: MetricConfig | None) -> Ladder:
    """Return a ladder of ToMe as one of a learned metric; without a recipe for one, as it is.

    Raises:
        ConfigError: if it is of another method.
    """
    if config is None:
        return ladder
    old = ladder.method
    if not isinstance(old, ToMe | DTEM):
        raise ConfigError(
            f"a metric is learned for the method tome, and the ladder {ladder.name!r} is of "
            f"{old.name!r}: leave out metric, or choose another ladder"
        )
    method = DTEM(old.importance, old.size, old.weight, config.channels)
    name = ladder.name if isinstance(old, DTEM) else f"{ladder.name}-{method.name}"
    return replace(ladder, name=name, method=method)


class Metric(nn.Module):
    """What `DTEM` learns for a model, as parameters."""

    def __init__(
        self, ladder: Ladder, config: MetricConfig, model: VisionTransformer, images: Tensor
    ) -> None:
        """Begin with the leading directions of the tokens, whose cosine is nearly the tokens' own.

        Args:
            ladder: that it is learned on, of `DTEM`.
            config: how.
            model: that it is learned for.
            images: [B, 3, H, W] from which the directions are taken.

        Raises:
            ConfigError: if there are fewer directions than channels.
        """
        super().__init__()
        self.ladder, self.config = ladder, config
        if config.channels > model.embed_dim:
            raise ConfigError(
                f"metric.channels must be at most the width of the model, {model.embed_dim}, got "
                f"{config.channels}"
            )
        shapes = ladder.shapes(len(model.blocks), model.embed_dim, model.patch_embed.grid_size)
        directions = leading_directions(model, images, config.channels)
        # Keys of a ParameterDict hold no dots.
        self.parts = nn.ParameterDict()
        for name, shape in shapes.items():
            block, _, part = name.partition(".")
            start = directions[int(block)] if part == "weight" else torch.zeros(shape)
            self.parts[name.replace(".", "/")] = nn.Parameter(start.clone())

    def tensors(self) -> dict[str, Tensor]:
        """Return the parameters as a bank names them."""
        return {f"{REDUCTION}{name.replace('/', '.')}": x for name, x in self.parts.items()}

    def forward(self) -> ReductionWeights:
        """Return the weights of hard merging, to which no gradient flows."""
        return self._weights(self.ladder)

    def soft(self, variant: Variant, model: VisionTransformer) -> Variant:
        """Return a variant as it runs while the metric learns, without a delta."""
        tokens = model.patch_embed.num_patches + model.num_prefix_tokens
        method = SoftDTEM(
            **options_of(self.ladder.method),
            temperature=self.config.temperature,
            removed=variant.plan(model, tokens).removed,
        )
        ladder = replace(self.ladder, method=method)
        return replace(variant, delta=None, ladder=ladder, learned=self._weights(ladder))

    def learns_in(self, micro: int, seed: int) -> bool:
        """Return whether a micro-batch is for the metric, not for the plug-ins."""
        generator = torch.Generator().manual_seed(derive(seed, "metric", micro))
        return torch.rand((), generator=generator).item() < self.config.share

    def _weights(self, ladder: Ladder) -> ReductionWeights:
        tensors = {name.replace("/", "."): x for name, x in self.parts.items()}
        return ReductionWeights(ladder.method, tensors)


@torch.no_grad()
def leading_directions(model: VisionTransformer, images: Tensor, channels: int) -> list[Tensor]:
    """Return, for each block, the directions [channels, D] in which its patch tokens lie most.

    Those of its tokens between attention and MLP in the stock model, each of length 1: the first
    eigenvectors of their second moments.
    """
    found: list[Tensor] = []

    def keep(_: nn.Module, inputs: tuple[Tensor]) -> None:
        tokens = F.normalize(inputs[0][:, model.num_prefix_tokens :].double().flatten(0, 1), dim=-1)
        found.append(torch.linalg.eigh(tokens.T @ tokens).eigenvectors.flip(1)[:, :channels].T)

    hooks = [block.norm2.register_forward_pre_hook(keep) for block in model.blocks]
    try:
        outputs(model, embed(model, images), Variant(), whole=True)
    finally:
        for hook in hooks:
            hook.remove()
    return [each.float() for each in found]
