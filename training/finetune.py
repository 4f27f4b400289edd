"""Fine-tuning a backbone on a labelled task, at any source rate.

Full fine-tuning: every weight is tuned, with a new head. What comes out is a model
folder in timm's own form, which `load_backbone` and timm load; its `config.json` also says
at which rate it was tuned.

Reference: ToCom, Table 3 (recipes for CIFAR-100 and FGVC).
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath, calculate_drop_path_rates
from timm.models import save_for_hf
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from tocom import Backbone, DataError, forward, load_backbone
from training import loop
from training.config import FinetuneConfig
from training.data import (
    Pictures,
    derive,
    evaluation_batches,
    mixing,
    train_transform,
)
from training.pictures import class_names, open_pictures


class AtRate(nn.Module):
    """A model that runs at one rate: what the processes of a distributed run can wrap."""

    def __init__(self, model: VisionTransformer, rate: int) -> None:
        """Hold the model and the rate."""
        super().__init__()
        self.model, self.rate = model, rate

    def forward(self, images: Tensor) -> Tensor:
        """Return logits [B, classes] of images [B, 3, H, W]."""
        return forward(self.model, images, self.rate)


class Finetuning:
    """The job of `tocom-train finetune --method full`; see `loop.Job`."""

    losses_each = 1

    def __init__(self, backbone: Backbone, config: FinetuneConfig, classes: int) -> None:
        """Give the backbone a new head and make all of it trainable."""
        model = backbone.model
        torch.manual_seed(derive(config.loop.seed, "init", 0))
        model.reset_classifier(classes)
        rates = calculate_drop_path_rates(config.drop_path, len(model.blocks))
        for block, rate in zip(model.blocks, rates, strict=True):
            block.drop_path1, block.drop_path2 = DropPath(rate), DropPath(rate)
        self.module: nn.Module = AtRate(model.requires_grad_(True), config.source)
        self.mixing = mixing(config.augment, classes, config.label_smoothing)
        self.label_smoothing = config.label_smoothing

    def losses(self, images: Tensor, labels: Tensor, micro: int) -> Iterator[Tensor]:
        """Yield the cross-entropy at the source rate."""
        smoothing = self.label_smoothing
        if self.mixing:  # smooths the labels itself
            images, labels = self.mixing(images, labels)
            smoothing = 0.0
        yield F.cross_entropy(self.module(images), labels, label_smoothing=smoothing)

    def notes(self, micros: range) -> dict[str, Any]:
        """Nothing."""
        return {}

    def watch(self) -> dict[str, float]:
        """Nothing: the test pictures are read once, at the end."""
        return {}


def finetune(config: FinetuneConfig, folder: Path) -> Path:
    """Fine-tune all weights and return the model folder.

    Raises:
        BackboneError, DataError, ConfigError: before any compute is spent.
        loop.TrainingError: if training cannot go on.
    """
    finished = folder / "model"
    if (finished / "config.json").exists():
        return finished
    backbone = load_backbone(config.backbone.name, config.backbone.architecture)
    classes = class_names(open_pictures(config.pictures))
    other = class_names(open_pictures(config.test))
    # Classes of a list are numbers, of which a small one may lack the last.
    if other != (classes[: len(other)] if config.test.list else classes):
        raise DataError(
            f"{config.pictures.path} has {len(classes)} classes and {config.test.path} "
            f"{len(other)}; they must be the same"
        )
    pictures = Pictures(
        [config.pictures], train_transform(backbone, config.augment), config.loop.on_unreadable
    )
    tuned_from = backbone.digest  # before its weights change
    accelerator = loop.start(config.loop, folder)
    job = Finetuning(backbone, config, len(classes))
    loop.run(
        accelerator, job, config.loop, config, pictures, pictures.keys(), folder,
        config.augment,
    )  # fmt: skip
    if accelerator.is_main_process:
        _save(backbone, config, classes, tuned_from, len(pictures.keys()), finished)
    accelerator.wait_for_everyone()
    return finished


def _save(
    backbone: Backbone,
    config: FinetuneConfig,
    class_names: list[str],
    tuned_from: str,
    pictures: int,
    folder: Path,
) -> None:
    accuracy = _accuracy(backbone, config)
    save_for_hf(
        backbone.model.half(),
        str(folder),
        model_config={
            "label_names": class_names,
            "source_rate": config.source,
            "backbone_digest": tuned_from,
            "training": {
                "recipe": config.model_dump(mode="json", exclude={"pictures", "test", "backbone"}),
                "backbone": backbone.architecture,
                "pictures": pictures,
                "test_accuracy": round(accuracy, 4),
            },
        },
        safe_serialization=True,
    )


@torch.inference_mode()
def _accuracy(backbone: Backbone, config: FinetuneConfig) -> float:
    device = next(backbone.model.parameters()).device
    correct = total = 0
    for images, labels in evaluation_batches(backbone, [config.test]):
        logits = forward(backbone.model, images.to(device), config.source)
        correct += int((logits.argmax(dim=-1).cpu() == labels).sum())
        total += len(labels)
    return correct / total
