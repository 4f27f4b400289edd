"""What `tocom-train segment` trains: a decoder, and what is tuned of the encoder.

The backbone is run, not owned: a checkpoint holds what is tuned and nothing else.

Reference: Segmenter, arXiv:2105.05633, section 4.1.
"""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import PartialState
from accelerate.utils import reduce
from timm.layers import DropPath, calculate_drop_path_rates
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from adapters import AdaptFormer, BackboneInfo
from adapters.ladder import part_of
from adapters.segmentation import Decoder, DecoderInfo, SegmentationInfo, Segmenter
from adapters.segmentation.decoder import HEAD_WIDTH
from adapters.segmentation.task import upsampled
from tocom import Backbone, Ladder, Variant
from tocom.dense import features
from training.ladders.chosen import chosen_ladder
from training.screen.progress import following
from training.seeds import derive
from training.segment.config import SegmentConfig
from training.segment.metrics import IGNORED, counts, mean_iou
from training.segment.scenes import Classes

#: Pictures [3, H, W], normalised, and their labels [H', W'].
Watched = Sequence[tuple[Tensor, Tensor]]


class Encoded(nn.Module):
    """An encoder with a decoder, seen as the parameters that are tuned."""

    def __init__(
        self,
        model: VisionTransformer,
        decoder: Decoder,
        variant: Variant,
        branches: AdaptFormer | None = None,
    ) -> None:
        """Take the parameters of `model` that require gradients, the decoder's and the branches'.

        Args:
            model: the encoder.
            decoder: on its features.
            variant: how the encoder is run, but for the branches.
            branches: of the encoder.
        """
        super().__init__()
        self._model = (model,)  # in a tuple it is no submodule
        self.variant, self.decoder, self.branches = variant, decoder, branches
        self.weights = nn.ParameterDict(
            {
                name.replace(".", "/"): parameter  # keys hold no dots
                for name, parameter in model.named_parameters()
                if parameter.requires_grad
            }
        )

    def train(self, mode: bool = True) -> "Encoded":
        """Set the mode, of the encoder too if it is tuned: its stochastic depth depends on it."""
        self._model[0].train(mode and self._learns)
        return super().train(mode)

    def no_weight_decay(self) -> set[str]:
        """Return the names of positions and tokens, which timm keeps from decaying."""
        names = self._model[0].no_weight_decay()
        return {"decoder.classes", *(f"weights.{name.replace('.', '/')}" for name in names)}

    def forward(self, images: Tensor) -> Tensor:
        """Return scores [B, K, H / p, W / p] of images [B, 3, H, W]."""
        branches = None if self.branches is None else self.branches()
        variant = replace(self.variant, adapter=branches)
        with nullcontext() if self._learns else torch.no_grad():
            found = features(self._model[0], images, variant)
        scores: Tensor = self.decoder(found)
        return scores

    @property
    def _learns(self) -> bool:
        return bool(self.weights) or self.branches is not None


class Segmenting:
    """The job of `tocom-train segment`; see `loop.Job`."""

    losses_each = 1

    def __init__(
        self, backbone: Backbone, config: SegmentConfig, classes: Classes, watched: Watched = ()
    ) -> None:
        """Make a decoder at random, and what the method tunes trainable.

        Raises:
            ReductionError: if the model cannot run the ladder.
        """
        model = backbone.model
        self.config, self.names, self.watched = config, classes.names, watched
        self.info = described(config, backbone, classes)
        self.ladder = chosen_ladder(config.ladder, model)
        torch.manual_seed(derive(config.loop.seed, "init", 0))
        like = next(model.parameters())
        decoder = self.info.decoder.build(model.embed_dim, len(classes.names), config.dropout)
        branches = None
        if config.method == "adaptformer":
            branches = AdaptFormer(
                len(model.blocks), model.embed_dim, config.adaptformer.bottleneck,
                config.adaptformer.scale,
            ).to(like)  # fmt: skip
        model.requires_grad_(config.method == "full")
        # The classifier plays no part.
        for name, head in model.named_children():
            if "head" in name or name == "fc_norm":
                head.requires_grad_(False)
        if config.method != "frozen":
            rates = calculate_drop_path_rates(config.drop_path, len(model.blocks))
            for block, rate in zip(model.blocks, rates, strict=True):
                block.drop_path1, block.drop_path2 = DropPath(rate), DropPath(rate)
        model.set_grad_checkpointing(config.loop.recompute_blocks)
        variant = Variant(config.source, proportional=config.proportional, ladder=self.ladder)
        self.backbone = backbone
        self.module: nn.Module = Encoded(model, decoder.to(like), variant, branches)

    def losses(self, images: Tensor, labels: Tensor, micro: int) -> Iterator[Tensor]:
        """Yield the mean cross-entropy of the pixels that count."""
        scores = upsampled(self.module(images), (labels.shape[1], labels.shape[2]))
        each = F.cross_entropy(scores.float(), labels.long(), ignore_index=IGNORED, reduction="sum")
        # A crop may have no pixel that counts.
        yield each / (labels != IGNORED).sum().clamp(min=1)

    def notes(self, micros: range) -> dict[str, Any]:
        """Nothing."""
        return {}

    @torch.inference_mode()
    def watch(self) -> dict[str, float]:
        """Return mIoU on the watched pictures, at the source rate."""
        if not self.watched:
            return {}
        sums = count_all(self.segmenter(), self.watched)
        return {f"unseen_miou_{self.config.source}": mean_iou(sums)}

    def segmenter(self) -> Segmenter:
        """Return what is trained, as it is now."""
        variant = self._encoded.variant
        backbone = replace(
            self.backbone,
            adapter=self._adapter,
            source=self.config.source,
            ladder=variant.ladder,
            proportional=variant.proportional,
        )
        return Segmenter(backbone, self._encoded.decoder, self.info)

    def tensors(self) -> dict[str, Tensor]:
        """Return what a task folder holds of it, under its names, in fp16 on the CPU."""
        encoded = self._encoded
        found = {f"decoder.{name}": each for name, each in encoded.decoder.state_dict().items()}
        if encoded.branches is not None:
            found["adaptformer.down"] = encoded.branches.down
            found["adaptformer.up"] = encoded.branches.up
        return {name: tensor.detach().cpu().half() for name, tensor in found.items()}

    @property
    def _encoded(self) -> Encoded:
        module = getattr(self.module, "module", self.module)  # of several processes, the inner one
        assert isinstance(module, Encoded)
        return module

    @property
    def _adapter(self) -> Any:
        return None if self._encoded.branches is None else self._encoded.branches()


def count_all(segmenter: Segmenter, scenes: Watched) -> Tensor:
    """Return the intersections and unions [K, 2] of all scenes, at the source rate.

    All processes call it, each takes its share of the scenes, and all get the same answer.

    Args:
        segmenter: what answers.
        scenes: pictures [3, H, W], normalised, and their labels [H', W'].
    """
    state, classes = PartialState(), len(segmenter.info.class_names)
    backbone = segmenter.backbone
    variant = Variant(
        backbone.source, None, backbone.adapter, backbone.proportional, backbone.ladder
    )
    device = next(segmenter.decoder.parameters()).device
    sums = torch.zeros(classes, 2, dtype=torch.int64)
    mine = range(state.process_index, len(scenes), state.num_processes)
    for index in following(mine, "segmenting", "picture"):
        image, labels = scenes[index]
        scores = segmenter.scores(image[None].to(device), variant)
        answer = segmenter.classes(scores, (labels.shape[0], labels.shape[1]))
        sums += counts(answer.cpu(), labels[None], classes)[0]
    total: Tensor = reduce(sums.to(device), reduction="sum").cpu()
    return total


def described(config: SegmentConfig, backbone: Backbone, classes: Classes) -> SegmentationInfo:
    """Return what a task folder says of a recipe, on this backbone.

    Raises:
        ReductionError: if the model cannot run the ladder.
        ValidationError: if something does not fit together.
    """
    ladder: Ladder = chosen_ladder(config.ladder, backbone.model)
    width = config.width or backbone.model.embed_dim
    if config.decoder == "mask":
        heads = config.heads or max(1, width // HEAD_WIDTH)
        decoder = DecoderInfo(kind="mask", layers=config.layers, width=width, heads=heads)
    else:
        decoder = DecoderInfo(kind="linear")
    tuned = config.method == "adaptformer"
    return SegmentationInfo(
        name=config.name,
        method="adaptformer" if tuned else "frozen",
        backbone=BackboneInfo.of(backbone),
        source=config.source,
        ladder=part_of(ladder),
        proportional=config.proportional,
        class_names=classes.names,
        palette=classes.palette,
        decoder=decoder,
        rank=config.adaptformer.bottleneck if tuned else None,
        scale=config.adaptformer.scale if tuned else 1.0,
        short_side=config.augment.short_side,
        window=config.augment.crop,
        stride=config.stride or config.augment.crop,
    )
