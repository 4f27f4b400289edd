"""Distilling a bank: the plug-ins learn to carry a backbone from any rate to any other.

A step draws pairs source ≠ target. Teacher: the frozen backbone at rate `source`. Student: the
same backbone at rate `target` with Δ(source→target). The KL divergence from teacher to
student is the loss; no labels.

Reference: Token Compensator (ToCom), arXiv:2408.06798, Algorithm 1 and section 3.3.
"""

import json
import math
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adapters import Bank, BankBackbone, BankInfo
from adapters.bank import tensor_shapes
from adapters.compose import compose_steps
from tocom import Backbone, Delta, forward, load_backbone
from training import loop
from training.config import DistillConfig
from training.data import Pictures, derive, evaluation_batches, train_transform


class Plugins(nn.Module):
    """A bank's tensors as parameters. A starts random, B at zero: the first delta is none."""

    def __init__(self, info: BankInfo) -> None:
        """Make the parameters that `info` describes."""
        super().__init__()
        self.info = info
        self.steps = nn.ParameterDict()
        for name, shape in tensor_shapes(info).items():
            tensor = torch.zeros(shape)
            if name.endswith(".A"):
                # nn.Linear's own start, which the reference keeps: fan-in is the width.
                nn.init.uniform_(tensor, -1 / math.sqrt(shape[-1]), 1 / math.sqrt(shape[-1]))
            self.steps[_key(name)] = nn.Parameter(tensor)

    def tensors(self) -> dict[str, Tensor]:
        """Return the parameters under the bank's names."""
        return {name: self.steps[_key(name)] for name in tensor_shapes(self.info)}

    def forward(self, source: int, target: int, dropout: float = 0.0) -> Delta:
        """Return Δ(source→target)."""
        return compose_steps(self.tensors(), self.info.scale, source, target, dropout)


class Distillation:
    """The job of `tocom-train distill`; see `loop.Job`."""

    def __init__(self, backbone: Backbone, config: DistillConfig, unseen: list[Tensor]) -> None:
        """Prepare a bank that changes nothing yet.

        Args:
            backbone: the frozen model.
            config: the recipe.
            unseen: batches [B, 3, H, W] of pictures that are not trained on.
        """
        info = BankInfo(
            name=config.name,
            backbone=BankBackbone.of(backbone),
            max_rate=config.max_rate,
            rank=config.rank,
            targets=config.targets,
            scale=config.scale,
        )
        torch.manual_seed(derive(config.loop.seed, "init", 0))
        self.module: nn.Module = Plugins(info)
        self.model = backbone.model
        self.config = config
        self.unseen = unseen
        self.watched = sorted({max(1, config.max_rate * part // 4) for part in range(1, 5)})

    def loss(self, images: Tensor, labels: Tensor, step: int) -> tuple[Tensor, dict[str, Any]]:
        """Return the KL divergence of a step: each random pair of rates on its share of images."""
        self.model.to(images.device)
        shares = images.chunk(self.config.pairs)
        losses, pairs = [], []
        for i, share in enumerate(shares):
            draw = step * self.config.pairs + i
            source, target = draw_pair(self.config.max_rate, self.config.loop.seed, draw)
            with torch.no_grad():
                teacher = forward(self.model, share, source)
            delta = self.module(source, target, self.config.dropout)
            student = forward(self.model, share, target, delta)
            losses.append(kd_loss(student, teacher) * len(share) / len(images))
            pairs.append((source, target))
        return torch.stack(losses).sum(), {"pairs": pairs}

    @torch.no_grad()
    def watch(self) -> dict[str, float]:
        """Return KL to rate 0 with and without the bank at each quarter of the ladder."""
        device = next(self.module.parameters()).device
        notes: dict[str, float] = {}
        pictures = sum(len(images) for images in self.unseen)
        for images in self.unseen:
            images = images.to(device)
            stock = forward(self.model, images)
            for rate in self.watched:
                for what, delta in (("plain", None), ("bank", self.module(0, rate))):
                    kl = kd_loss(forward(self.model, images, rate, delta), stock)
                    key = f"unseen_kl_{rate}_{what}"
                    notes[key] = notes.get(key, 0.0) + kl.item() * len(images) / pictures
        return notes


def kd_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Return KL(teacher ‖ student) in nats a picture, of logits [B, classes], temperature 1.

    The reference divides by the number of classes as well, which only scales the gradients
    and leaves AdamW's steps as they are.
    """
    return F.kl_div(
        student.float().log_softmax(dim=-1),
        teacher.float().log_softmax(dim=-1),
        reduction="batchmean",
        log_target=True,
    )


def draw_pair(max_rate: int, seed: int, draw: int) -> tuple[int, int]:
    """Return the (source, target) of a draw, uniform over the pairs with source ≠ target."""
    generator = torch.Generator().manual_seed(derive(seed, "pair", draw))
    source = int(torch.randint(max_rate + 1, (), generator=generator))
    offset = int(torch.randint(1, max_rate + 1, (), generator=generator))
    return source, (source + offset) % (max_rate + 1)


def distill(config: DistillConfig, folder: Path) -> Path:
    """Distil a bank and return its folder.

    Raises:
        BackboneError, DataError, ConfigError: before any compute is spent.
        loop.TrainingError: if training cannot go on.
    """
    if (finished := folder / "bank").exists():
        return finished
    backbone = load_backbone(config.backbone.name, config.backbone.architecture)
    pictures = Pictures(config.pictures, train_transform(backbone, config.augment))
    seen, unseen = _hold_out(pictures.keys(), config.unseen)
    keys = [key for key in seen for _ in range(config.pictures[key[0]].times)]
    watched = evaluation_batches(backbone, config.pictures, unseen) if unseen else ()
    job = Distillation(backbone, config, [images for images, _ in watched])
    loop.run(job, config.loop, config, pictures, keys, folder)
    plugins = job.module
    assert isinstance(plugins, Plugins)
    training = {
        "recipe": config.model_dump(mode="json", exclude={"pictures", "backbone"}),
        "pictures": [{"name": Path(p.path).name, "times": p.times} for p in config.pictures],
        "distinct_pictures": len(seen),
        "samples_seen": config.loop.steps * config.loop.batch_size,
        "last": json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1]),
        "versions": {name: version(name) for name in ("torch", "timm")},
    }
    info = plugins.info.model_copy(update={"training": training})
    tensors = {name: tensor.detach().cpu().half() for name, tensor in plugins.tensors().items()}
    return Bank(info, tensors).save(finished)


def _hold_out(
    keys: list[tuple[int, int]], count: int
) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Split off `count` pictures, spread evenly over all."""
    held = {keys[i * len(keys) // count] for i in range(count)}
    return [key for key in keys if key not in held], sorted(held)


def _key(name: str) -> str:
    """ParameterDict keys hold no dots."""
    return name.replace(".", "_")
