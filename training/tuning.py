"""What fine-tuning trains: all weights, a head, LoRA's pairs or AdaptFormer's branches.

The backbone is run, not owned: a checkpoint holds what is tuned and nothing else.

Reference: ToCom, Table 3 (recipes), section 4.1 (AdaptFormer); of several classes Ridnik et al.,
Asymmetric Loss, arXiv:2009.14119.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath, calculate_drop_path_rates
from timm.loss import AsymmetricLossMultiLabel
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from adapters import AdaptFormer
from adapters.ladder import REDUCTION
from adapters.task import heads_of
from tocom import TOME, Backbone, ConfigError, Ladder, Variant
from tocom.reduction import DynamicViT
from tocom.vit import embed, outputs
from training.config import FinetuneConfig, LoraConfig
from training.ladders.chosen import chosen_ladder
from training.learned.dynamicvit import Lesson, Pruned, pruned
from training.learned.weights import LearnedWeights, drawn_rung, shares_left
from training.pictures.augment import mixing
from training.seeds import derive

#: What PEFT calls the factors of a pair, and what a task folder calls them.
_FACTORS = {".lora_A.default.weight": ".A", ".lora_B.default.weight": ".B"}


class Tuned(nn.Module):
    """A model at one rate, seen as the parameters that are tuned of it."""

    def __init__(
        self,
        model: VisionTransformer,
        rate: int,
        adapter: AdaptFormer | None = None,
        ladder: Ladder = TOME,
        proportional: bool = True,
        learned: LearnedWeights | None = None,
    ) -> None:
        """Take the parameters of `model` that require gradients, of `adapter` and of `learned`."""
        super().__init__()
        self._model = (model,)  # in a tuple it is no submodule
        self.rate, self.ladder, self.proportional = rate, ladder, proportional
        self.adapter, self.learned = adapter, learned
        self.weights = nn.ParameterDict(
            {
                _key(name): parameter
                for name, parameter in model.named_parameters()
                if parameter.requires_grad
            }
        )

    def train(self, mode: bool = True) -> "Tuned":
        """Set the mode of the model as well, whose stochastic depth depends on it."""
        self._model[0].train(mode)
        return super().train(mode)

    def no_weight_decay(self) -> set[str]:
        """Return the names of positions and prefix tokens, which timm keeps from decaying."""
        return {f"weights.{_key(name)}" for name in self._model[0].no_weight_decay()}

    def variant(self, rate: int | None = None) -> Variant:
        """Return how the model runs; at a rate of its own, unless another is given."""
        adapter = self.adapter() if self.adapter is not None else None
        learned = self.learned() if self.learned is not None else None
        rate = self.rate if rate is None else rate
        return Variant(rate, None, adapter, self.proportional, self.ladder, learned)

    def forward(self, images: Tensor, rate: int | None = None) -> Tensor:
        """Return logits [B, classes] of images [B, 3, H, W]; the rate as in `variant`."""
        (model,) = self._model
        logits = outputs(model, embed(model, images), self.variant(rate)).logits
        if self.learned is not None:
            # All of them take part, or several processes would wait for the gradients of those
            # that a rung has no use for.
            logits = logits + 0 * sum(each.sum() for each in self.learned.parameters())
        return logits


class Pruning(Tuned):
    """The same as DynamicViT runs it while it learns."""

    def forward(self, images: Tensor) -> Pruned:  # type: ignore[override]
        """Return the answer to images [B, 3, H, W]."""
        (model,) = self._model
        return pruned(model, embed(model, images), self.variant())


class Finetuning:
    """The job of `tocom-train finetune`; see `loop.Job`."""

    losses_each = 1

    def __init__(self, backbone: Backbone, config: FinetuneConfig, classes: int) -> None:
        """Give the backbone a new head and make what the method tunes trainable.

        Raises:
            ConfigError: if the method needs what is not installed.
            ReductionError: if the model cannot run the ladder.
        """
        model = backbone.model
        self.ladder, self.proportional = chosen_ladder(config.ladder, model), config.proportional
        torch.manual_seed(derive(config.loop.seed, "init", 0))
        adapter = None
        if config.method == "lora":
            _add_lora(model, config.lora)
        elif config.method == "adaptformer":
            adapter = AdaptFormer(
                len(model.blocks), model.embed_dim, config.adaptformer.bottleneck,
                config.adaptformer.scale,
            ).to(next(model.parameters()))  # fmt: skip
        else:
            model.requires_grad_(config.method == "full")
        model.reset_classifier(classes)
        self.heads = heads_of(model)
        for name in self.heads:
            model.get_submodule(name).to(next(model.parameters())).requires_grad_(True)
        rates = calculate_drop_path_rates(config.drop_path, len(model.blocks))
        for block, rate in zip(model.blocks, rates, strict=True):
            block.drop_path1, block.drop_path2 = DropPath(rate), DropPath(rate)
        model.set_grad_checkpointing(config.loop.recompute_blocks)
        self.model, self.config = model, config
        learned, self.lesson, kind = None, None, Tuned
        if self.ladder.method.learns:
            learned = LearnedWeights(self.ladder, backbone).to(next(model.parameters()))
        if isinstance(self.ladder.method, DynamicViT):
            shares = shares_left(self.ladder, config.source, model)
            self.lesson, kind = Lesson(config.dynamicvit, shares, classes), Pruning
        self.module: nn.Module = kind(
            model, config.source, adapter, self.ladder, config.proportional, learned
        )
        if config.loop.compile:
            self.module.compile()  # one rate and one size of batches: one graph
        self.mixing = mixing(config.augment, classes, config.label_smoothing)
        self.label_smoothing = config.label_smoothing
        self.many = config.many

    def losses(self, images: Tensor, labels: Tensor, micro: int) -> Iterator[Tensor]:
        """Yield the loss of the labels at the source rate; of a learned method, also at others.

        It is the cross-entropy; where a picture has several classes, the asymmetric loss.
        """
        smoothing = self.label_smoothing
        if self.mixing and not self.many:  # smooths the labels itself
            images, labels = self.mixing(images, labels)
            smoothing = 0.0
        more: Tensor | float = 0.0
        if self.lesson is not None:
            answer = self.module(images)
            logits, more = answer.logits, self.lesson(answer, images)
        else:
            logits = self.module(images, self._rung(micro))
        if self.many:
            # A part of a set may lack the last classes.
            labels = F.pad(labels, (0, logits.shape[1] - labels.shape[1]))
            yield AsymmetricLossMultiLabel(smoothing=smoothing)(logits, labels) + more
        else:
            yield F.cross_entropy(logits, labels, label_smoothing=smoothing) + more

    def notes(self, micros: range) -> dict[str, Any]:
        """Return the rates at which a learned method runs."""
        if not self.ladder.method.learns:
            return {}
        return {"rates": [self._rung(micro) for micro in micros]}

    def _rung(self, micro: int) -> int:
        return drawn_rung(self.ladder, self.config.source, self.config.loop.seed, micro)

    def watch(self) -> dict[str, float]:
        """Nothing: the test pictures are read once, at the end."""
        return {}

    @torch.no_grad()
    def tuned(self, backbone: Backbone) -> Backbone:
        """Return the backbone that was given, as it is now, with what was learned beside it."""
        assert isinstance(self.module, Tuned)
        variant = self.module.variant()
        return replace(
            backbone,
            adapter=variant.adapter,
            learned=variant.learned,
            ladder=self.ladder,
            proportional=self.proportional,
            multi_label=self.many,
        )

    def tensors(self) -> dict[str, Tensor]:
        """Return what was tuned, under the names of a task folder, in fp16 on the CPU."""
        found: dict[str, Tensor] = {}
        for head in self.heads:
            layer: Any = self.model.get_submodule(head)
            found |= {f"{head}.weight": layer.weight, f"{head}.bias": layer.bias}
        assert isinstance(self.module, Tuned)
        if (adapter := self.module.adapter) is not None:
            found |= {"adaptformer.down": adapter.down, "adaptformer.up": adapter.up}
        if (learned := self.module.variant().learned) is not None:
            found |= {f"{REDUCTION}{name}": tensor for name, tensor in learned.tensors.items()}
        for name, parameter in self.model.named_parameters():
            for ending, factor in _FACTORS.items():
                if name.endswith(ending):
                    found[f"lora.{name.removesuffix(ending)}{factor}"] = parameter
        return {name: tensor.detach().cpu().half() for name, tensor in found.items()}


def _key(name: str) -> str:
    """ParameterDict keys hold no dots."""
    return name.replace(".", "/")


def _add_lora(model: VisionTransformer, config: LoraConfig) -> None:
    """Let PEFT put its pairs beside the layers; all else is frozen."""
    try:
        import peft
    except ImportError as error:
        raise ConfigError("method=lora needs PEFT: pip install 'tocom-serve[train]'") from error
    peft.inject_adapter_in_model(
        peft.LoraConfig(
            r=config.rank,
            lora_alpha=config.alpha,
            lora_dropout=config.dropout,
            target_modules=list(config.layers),
        ),
        model,
    )
