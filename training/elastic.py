"""Elastic tuning: all weights of a backbone learn to answer at every rung as it did at rung 0.

At every rung, or at chosen ones: at one alone, nothing is shared, and the result is what a model of
that compute can reach.

No labels and no plug-ins: the teacher is the backbone as it was, the student the same weights at
random rungs. What comes out is a model folder. It is the way of networks of many widths, and the
rival of a bank: nothing is added at a rung, but the stock model is gone, and tasks that were tuned
from it with it.

Reference: Slimmable Neural Networks, arXiv:1812.08928, section 3; Universally Slimmable Networks,
arXiv:1903.05134, section 3.3 (the whole network teaches).
"""

import copy
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from adapters import BackboneInfo
from adapters.ladder import part_of
from adapters.task import data_config
from tocom import Backbone, ConfigError, Ladder, Variant, load_backbone
from tocom.vit import Outputs, embed, outputs
from training import loop
from training.config import ElasticConfig
from training.finetune import save_model
from training.ladders.chosen import chosen_ladder
from training.losses import answer_loss, check_teaches, lesson
from training.pictures.augment import mixing
from training.pictures.batches import unlabelled
from training.pictures.unseen import mean_over
from training.run_folder import facts, refuse_other_run
from training.screen.header import header
from training.screen.progress import following, say
from training.seeds import derive

#: Pictures that tell what each rung costs before anything is learned.
PLAIN_PICTURES = 24


class Weights(nn.Module):
    """A model all of whose weights learn, run at any rung."""

    def __init__(self, model: VisionTransformer, ladder: Ladder, proportional: bool) -> None:
        """Make all parameters of `model` trainable."""
        super().__init__()
        self.model = model.requires_grad_(True)
        self.ladder, self.proportional = ladder, proportional

    def no_weight_decay(self) -> set[str]:
        """Return the names of positions and prefix tokens, which timm keeps from decaying."""
        return {f"model.{name}" for name in self.model.no_weight_decay()}

    def forward(self, images: Tensor, rung: int, trace: bool = False) -> Outputs:
        """Return what `tocom.vit.outputs` says of images [B, 3, H, W]."""
        variant = Variant(rung, proportional=self.proportional, ladder=self.ladder)
        return outputs(self.model, embed(self.model, images), variant, trace)


class ElasticTuning:
    """The job of `tocom-train elastic`; see `loop.Job`."""

    def __init__(self, backbone: Backbone, config: ElasticConfig, unseen: list[Tensor]) -> None:
        """Copy the backbone: the copy learns, the backbone teaches.

        Args:
            backbone: the model as it is.
            config: the recipe.
            unseen: batches [B, 3, H, W] of pictures that are not trained on.

        Raises:
            ConfigError: as of `tuned_ladder`.
        """
        self.ladder = tuned_ladder(backbone, config)
        self.teacher = backbone.model.requires_grad_(False)
        self.student = copy.deepcopy(backbone.model)
        self.student.set_grad_checkpointing(config.loop.recompute_blocks)
        self.module: nn.Module = Weights(self.student, self.ladder, config.proportional)
        self.mixing = mixing(config.augment, classes=1, label_smoothing=0.0)
        self.config = config
        self.traced = config.tokens > 0
        self.losses_each = config.students
        self.unseen = unseen
        self.weights = self._plain_losses().sqrt().tolist()  # [rung]
        self.watched = [0, *sorted({max(1, config.max_rate * i // 4) for i in range(1, 5)})]

    def losses(self, images: Tensor, labels: Tensor, micro: int) -> Iterator[Tensor]:
        """Yield the loss of each rung, over the root of what it is before anything is learned.

        Undivided, the dear rungs would hardly count and rung 0 drift; divided by all of it, rungs
        that are nearly the stock model would outweigh the cheap ones, which have most to learn.
        """
        if self.mixing:
            images, _ = self.mixing(images, torch.zeros_like(labels))  # classes play no part
        with torch.no_grad():
            teacher = outputs(self.teacher, embed(self.teacher, images), Variant(), self.traced)
        for rung in draw_rungs(self.config, micro):
            student = self.module(images, rung, self.traced)
            yield self._loss(student, teacher) / self.weights[rung] / self.config.students

    def _loss(self, student: Outputs, teacher: Outputs) -> Tensor:
        return lesson(
            student,
            teacher,
            self.teacher.num_classes > 0,
            self.config.features,
            self.config.tokens,
        )

    @torch.no_grad()
    def _plain_losses(self) -> Tensor:
        """Return the loss of each rung of the backbone as it is; of rung 0, that of rung 1."""
        device = next(self.teacher.parameters()).device
        tokens = embed(self.teacher, self.unseen[0][:PLAIN_PICTURES].to(device))
        whole = outputs(self.teacher, tokens, Variant(), self.traced)
        losses = []
        say("measuring what each rung loses before anything is learned")
        for rung in following(range(1, self.config.max_rate + 1), "losses", "rung"):
            variant = Variant(rung, proportional=self.config.proportional, ladder=self.ladder)
            losses.append(self._loss(outputs(self.teacher, tokens, variant, self.traced), whole))
        found = torch.stack(losses)
        # Rungs that are (nearly) the stock model must not outweigh all others; where all are, they
        # count as they are.
        found = found.clamp(min=found.max().item() / 1000 or 1.0)
        return torch.cat([found[:1], found])

    def notes(self, micros: range) -> dict[str, Any]:
        """Return the rungs, one for each loss."""
        return {"rates": [rung for micro in micros for rung in draw_rungs(self.config, micro)]}

    def watch(self) -> dict[str, float]:
        """Return the KL divergence, or the error without a head, from the backbone at rung 0."""
        device = next(self.teacher.parameters()).device
        found = mean_over(self.unseen, self._against_stock, len(self.watched), device)
        what = "kl" if self.teacher.num_classes else "error"
        return {
            f"unseen_{what}_{rung}": value
            for rung, value in zip(self.watched, found.tolist(), strict=True)
        }

    def _against_stock(self, images: Tensor) -> list[Tensor]:
        whole = outputs(self.teacher, embed(self.teacher, images), Variant())
        tokens = embed(self.student, images)
        losses = []
        for rung in self.watched:
            variant = Variant(rung, proportional=self.config.proportional, ladder=self.ladder)
            answer = outputs(self.student, tokens, variant)
            losses.append(answer_loss(answer, whole, self.teacher.num_classes > 0))
        return losses


def tuned_ladder(backbone: Backbone, config: ElasticConfig) -> Ladder:
    """Return the ladder that a backbone is tuned for.

    Raises:
        ConfigError: if there is nothing to learn from, the ladder has not so many rungs or is of a
            learned method, or the backbone scores several classes a picture.
    """
    check_teaches(backbone, config.features, config.tokens, "elastic tuning is")
    ladder = chosen_ladder(config.ladder, backbone.model)
    if ladder.method.learns:
        how = "in a bank: distil one" if ladder.method.in_bank else "from labels: fine-tune on it"
        raise ConfigError(f"the method {ladder.method.name!r} is learned {how}")
    if ladder.top is not None and config.max_rate > ladder.top:
        raise ConfigError(
            f"max_rate ({config.max_rate}) must be a rung of the ladder {ladder.name!r}, at most "
            f"{ladder.top}"
        )
    return ladder


def draw_rungs(config: ElasticConfig, micro: int) -> list[int]:
    """Return the distinct rungs of a micro-batch, all alike likely."""
    generator = torch.Generator().manual_seed(derive(config.loop.seed, "rungs", micro))
    drawn = torch.randperm(len(config.tuned_for), generator=generator)[: config.students]
    return [config.tuned_for[i] for i in drawn.tolist()]


def elastic(config: ElasticConfig, folder: Path) -> Path:
    """Tune a backbone for all rungs and return the model folder.

    Raises:
        BackboneError, DataError, ConfigError: before any compute is spent.
        loop.TrainingError: if training cannot go on.
    """
    longer = refuse_other_run(folder, config)
    if (finished := folder / "model").exists() and not longer:
        return finished
    say(f"loading {config.backbone.name}")
    backbone = load_backbone(config.backbone.name, config.backbone.architecture)
    backbone.model.pretrained_cfg |= data_config("crop", config.crop_pct)
    tuned_from = BackboneInfo.of(backbone).digest
    data = unlabelled(backbone, config)
    accelerator = loop.start(config.loop, folder)
    say(header(accelerator, config.loop, config.backbone, data.pictures, data.keys, folder))
    backbone.model.to(accelerator.device)
    job = ElasticTuning(backbone, config, data.unseen)
    loop.run(
        accelerator, job, config.loop, config, data.pictures, data.keys, folder, config.augment
    )
    if accelerator.is_main_process:
        backbone.model.load_state_dict(job.student.state_dict())
        stock = replace(backbone, learned=None)  # of another ladder, and of no use on this one
        save_model(stock, _said(config, backbone, tuned_from, data.distinct, folder), finished)
    accelerator.wait_for_everyone()
    return finished


def _said(
    config: ElasticConfig, backbone: Backbone, tuned_from: str, distinct: int, folder: Path
) -> dict[str, Any]:
    """Return what the model folder says of itself."""
    training = {"method": "elastic", **facts(config, distinct, folder)}
    part = part_of(chosen_ladder(config.ladder, backbone.model))
    return {
        "label_names": list(backbone.class_names),
        "source_rate": config.rates[0] if len(config.rates) == 1 else 0,
        **({} if part is None else {"ladder": part.model_dump(mode="json")}),
        **({} if config.proportional else {"proportional": False}),
        "backbone_digest": tuned_from,
        "training": training,
    }
