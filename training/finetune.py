"""Fine-tuning a backbone on a labelled task, at any source rate.

Full fine-tuning: every weight is tuned, with a new head. What comes out is a model
folder in timm's own form, which `load_backbone` and timm load; its `config.json` also says
at which rate it was tuned.

Reference: ToCom, Table 3 (recipes for CIFAR-100 and FGVC).
"""

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
    open_pictures,
    train_transform,
)


class Finetuning:
    """The job of `tocom-train finetune --method full`; see `loop.Job`."""

    def __init__(self, backbone: Backbone, config: FinetuneConfig, classes: int) -> None:
        """Give the backbone a new head and make all of it trainable."""
        model = backbone.model
        torch.manual_seed(derive(config.loop.seed, "init", 0))
        model.reset_classifier(classes)
        rates = calculate_drop_path_rates(config.drop_path, len(model.blocks))
        for block, rate in zip(model.blocks, rates, strict=True):
            block.drop_path1, block.drop_path2 = DropPath(rate), DropPath(rate)
        self.module: nn.Module = model.requires_grad_(True)
        self.config = config

    def loss(self, images: Tensor, labels: Tensor, step: int) -> tuple[Tensor, dict[str, Any]]:
        """Return the cross-entropy at the source rate."""
        logits = forward(self.module, images, self.config.source)
        correct = (logits.argmax(dim=-1) == labels).float().mean().item()
        loss = F.cross_entropy(logits, labels, label_smoothing=self.config.label_smoothing)
        return loss, {"accuracy": correct}

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
    class_names = _class_names(config.pictures.path)
    if (other := _class_names(config.test.path)) != class_names:
        raise DataError(
            f"{config.pictures.path} has {len(class_names)} classes and {config.test.path} "
            f"{len(other)}; they must be the same folders"
        )
    pictures = Pictures([config.pictures], train_transform(backbone, config.augment))
    tuned_from = backbone.digest  # before its weights change
    job = Finetuning(backbone, config, len(class_names))
    loop.run(job, config.loop, config, pictures, pictures.keys(), folder)
    model = job.module
    assert isinstance(model, VisionTransformer)
    accuracy = _accuracy(backbone, config)
    save_for_hf(
        model.half(),
        str(finished),
        model_config={
            "label_names": class_names,
            "source_rate": config.source,
            "backbone_digest": tuned_from,
            "training": {
                "recipe": config.model_dump(mode="json", exclude={"pictures", "test", "backbone"}),
                "backbone": backbone.architecture,
                "pictures": len(pictures.keys()),
                "test_accuracy": round(accuracy, 4),
            },
        },
        safe_serialization=True,
    )
    return finished


@torch.inference_mode()
def _accuracy(backbone: Backbone, config: FinetuneConfig) -> float:
    device = next(backbone.model.parameters()).device
    correct = total = 0
    for images, labels in evaluation_batches(backbone, [config.test]):
        logits = forward(backbone.model, images.to(device), config.source)
        correct += int((logits.argmax(dim=-1).cpu() == labels).sum())
        total += len(labels)
    return correct / total


def _class_names(path: str) -> list[str]:
    reader = open_pictures(path).reader
    classes: dict[str, int] = getattr(reader, "class_name_to_idx", None) or reader.class_to_idx
    return sorted(classes, key=lambda name: classes[name])
