"""Pruning channels: a model learns to do without the least of them, and becomes physically smaller.

All its weights learn, and so do the compactors, from labels, from the model as it was, or from
both. What comes out is a model folder. Of a task with AdaptFormer's branches it has no head, and
the task comes out beside it.

Reference: CAIT, consistent dynamic channel pruning; joint with its merging of neighbours if the
recipe's ladder has the method `atme`.
"""

import copy
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import PartialState
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from adapters import AdaptFormer, BackboneInfo, TaskModel, open_task
from adapters.ladder import part_of
from adapters.task import data_config, heads_of
from tocom import Adapter, Backbone, ConfigError, LowRank, Variant, cost, load_backbone
from tocom.pruned import Channels, refusal
from tocom.vit import embed, outputs
from training import loop
from training.finetune import save_model
from training.ladders.chosen import chosen_ladder
from training.losses import kd_loss
from training.measuring import MANY_CLASSES, Measurement, class_indices, compare
from training.pictures.augment import mixing
from training.pictures.batches import unlabelled
from training.pictures.unseen import mean_over
from training.prune.budget import freed_by, wanted_macs
from training.prune.compactors import choose, compact, fold, lasso, scores_of
from training.prune.config import PruneConfig
from training.prune.selection import select
from training.run_folder import facts, refuse_other_run
from training.screen.header import header
from training.screen.progress import say


class Network(nn.Module):
    """A model at one rate, all of whose weights learn, and the branches of its task."""

    def __init__(
        self, model: VisionTransformer, variant: Variant, branches: AdaptFormer | None
    ) -> None:
        """Make all parameters trainable; `variant` is without branches."""
        super().__init__()
        self.model = model.requires_grad_(True)
        self.variant, self.branches = variant, branches

    def no_weight_decay(self) -> set[str]:
        """Return the names of positions and prefix tokens, as timm has it, and of compactors."""
        compactors = {name for name, _ in self.named_parameters() if ".compactors." in name}
        return {f"model.{name}" for name in self.model.no_weight_decay()} | compactors

    def forward(self, images: Tensor) -> Tensor:
        """Return logits [B, classes] of images [B, 3, H, W]."""
        adapter = None if self.branches is None else self.branches()
        variant = replace(self.variant, adapter=adapter)
        return outputs(self.model, embed(self.model, images), variant).logits


class Pruning:
    """The job of `tocom-train prune`; see `loop.Job`."""

    losses_each = 1

    def __init__(
        self, backbone: Backbone, config: PruneConfig, unseen: list[Tensor], micros: int = 1
    ) -> None:
        """Copy the model: the copy learns, the model teaches.

        Args:
            backbone: the model as it is, which says its rate and ladder.
            config: the recipe.
            unseen: batches [B, 3, H, W] of pictures that are not trained on.
            micros: micro-batches of a step, of all processes.

        Raises:
            ConfigError: if it has no channels that can go, not so many, or nothing to learn from,
                scores several classes a picture, or its ladder's method is a learned one.
            DataError: if the classes of labelled pictures, or of those of the test, are not its.
        """
        model = backbone.model
        if (reason := refusal(model)) is not None:
            raise ConfigError(f"{backbone.name} cannot be pruned: {reason}")
        if Channels.of(model) is not None:
            raise ConfigError(f"{backbone.name} is pruned already: prune the model that it was")
        if not model.num_classes:
            raise ConfigError(
                f"{backbone.name} has no head, so there are no logits to learn from; give a task"
            )
        if backbone.multi_label:
            raise ConfigError(
                f"{backbone.name} {MANY_CLASSES}; pruned are models that answer one class a picture"
            )
        if (method := backbone.ladder.method).learns:
            raise ConfigError(
                f"{backbone.name} cannot be pruned on the ladder {backbone.ladder.name!r}: its "
                f"method {method.name!r} is learned; give a ladder whose method is not, such as "
                "ladder=tome"
            )
        self.wanted = wanted_macs(backbone, backbone.ladder, backbone.source, config.target)
        self.freed = freed_by(backbone, backbone.ladder, backbone.source)
        self.classes = None
        if config.labelled:
            self.classes = torch.tensor(class_indices(config.pictures[0], backbone))
        if config.test is not None:  # it is tested at the end, after hours
            class_indices(config.test, backbone, "pruning does without `test`")
        self.variant = Variant(backbone.source, None, None, backbone.proportional, backbone.ladder)
        self.teacher = model.requires_grad_(False)
        self.teacher_variant = replace(self.variant, adapter=backbone.adapter)
        self.student = copy.deepcopy(model)
        compact(self.student, config.masked)
        self.student.set_grad_checkpointing(config.loop.recompute_blocks)
        self.network = Network(self.student, self.variant, _branches(backbone))
        self.module: nn.Module = self.network
        self.mixing = mixing(config.augment, model.num_classes, config.label_smoothing)
        self.config, self.unseen, self.micros = config, unseen, micros

    def losses(self, images: Tensor, labels: Tensor, micro: int) -> Iterator[Tensor]:
        """Choose channels anew if it is time; yield the loss, the lasso included."""
        config = self.config
        step, first = divmod(micro, self.micros)
        if not first and (share := config.target_at(step)) is not None:
            self._choose(share)
        if self.classes is None:
            labels = torch.zeros_like(labels)  # classes play no part
        else:
            labels = self.classes.to(labels.device)[labels]
        smoothing = config.label_smoothing
        if self.mixing:  # smooths the labels itself
            images, labels = self.mixing(images, labels)
            smoothing = 0.0
        answer = self.module(images)
        terms = [config.lasso * lasso(self.student)]
        if self.classes is not None:
            terms.append(F.cross_entropy(answer, labels, label_smoothing=smoothing))
        if config.teacher:
            terms.append(config.teacher * kd_loss(answer, self._taught(images)))
        yield torch.stack(terms).sum()

    def _choose(self, share: float) -> None:
        scores = scores_of(self.student, self.config.score)
        wanted = self.wanted * share / self.config.target
        choose(self.student, select(scores, self.freed, wanted).kept)

    def notes(self, micros: range) -> dict[str, Any]:
        """Return the share of the multiply-adds that is chosen, if channels were chosen."""
        share = self.config.target_at(micros.start // self.micros)
        return {} if share is None else {"chosen": share}

    def watch(self) -> dict[str, float]:
        """Return the KL divergence from the model as it was, on unseen pictures."""
        if not self.unseen:
            return {}
        device = next(self.teacher.parameters()).device
        found = mean_over(self.unseen, self._against_teacher, 1, device)
        return {f"unseen_kl_{self.variant.rate}": found.item()}

    def _against_teacher(self, images: Tensor) -> list[Tensor]:
        return [kd_loss(self.network(images), self._taught(images))]

    @torch.no_grad()
    def _taught(self, images: Tensor) -> Tensor:
        """Return the logits of the model as it was."""
        return outputs(self.teacher, embed(self.teacher, images), self.teacher_variant).logits


def prune(config: PruneConfig, folder: Path) -> Path:
    """Prune a model and return the model folder.

    Raises:
        BackboneError, DataError, ConfigError: before any compute is spent.
        loop.TrainingError: if training cannot go on.
    """
    longer = refuse_other_run(folder, config)
    finished = folder / "model"
    if _is_done(config, folder) and not longer:
        return finished
    say(f"loading {config.backbone.name}")
    backbone = load(config)
    data = unlabelled(backbone, config)
    accelerator = loop.start(config.loop, folder)
    say(header(accelerator, config.loop, config.backbone, data.pictures, data.keys, folder))
    backbone.model.to(accelerator.device)
    micros = accelerator.num_processes * config.loop.accumulation
    job = Pruning(backbone, config, data.unseen, micros)
    loop.run(
        accelerator, job, config.loop, config, data.pictures, data.keys, folder, config.augment
    )
    notes = {"method": "prune", **facts(config, data.distinct, folder)}
    save(job, config, backbone, notes, folder)
    accelerator.wait_for_everyone()
    return finished


def load(config: PruneConfig) -> Backbone:
    """Return the model of a recipe, with its task, at the rate that it is pruned for."""
    backbone = load_backbone(config.backbone.name, config.backbone.architecture)
    if config.task is not None:
        backbone = open_task(config.task).on(backbone)
    backbone.model.pretrained_cfg |= data_config("crop", config.crop_pct)
    ladder = backbone.ladder
    if config.ladder is not None:
        ladder = chosen_ladder(config.ladder, backbone.model)
    source = backbone.source if config.source is None else config.source
    return replace(backbone, ladder=ladder, source=source)


def save(
    job: Pruning, config: PruneConfig, backbone: Backbone, notes: dict[str, Any], folder: Path
) -> None:
    """Write what came out, with what it costs and how many answers are right.

    All processes call it and share out the test pictures; the first one writes.
    """
    pruned = replace(backbone, model=job.student, adapter=_rounded(job.module))
    fold(pruned.model)
    pruned.model.half().float().requires_grad_(False)  # what is tested is what is written
    ladder, rate = backbone.ladder, backbone.source
    for when, model in (("before", backbone), ("after", pruned)):
        notes[when] = {
            "macs": cost(model.model, rate, ladder=ladder).macs,
            "parameters": sum(each.numel() for each in model.model.parameters()),
            **_tested(model, config, folder / f"test-{when}.json"),
        }
    if not PartialState().is_main_process:
        return
    part = part_of(ladder)
    said = {
        "source_rate": rate,
        **({} if part is None else {"ladder": part.model_dump(mode="json")}),
        **({} if backbone.proportional else {"proportional": False}),
        "backbone_digest": backbone.tuned_from or backbone.digest,
        "training": notes,
    }
    if config.task is None or pruned.adapter is None:
        save_model(pruned, {"label_names": list(backbone.class_names), **said}, folder / "model")
        return
    tensors = _task_tensors(pruned)
    pruned.model.reset_classifier(0)
    if not (folder / "model").exists():
        save_model(pruned, said, folder / "model")
    info = open_task(config.task).info.model_copy(
        update={
            "backbone": BackboneInfo.of(load_backbone(str(folder / "model"))),
            "source": rate,
            "ladder": part,
            "scale": 1.0,
            "training": notes,
            "evaluation": None,
            "calibration": None,
            "digest": "",
        }
    )
    TaskModel(info, tensors).save(folder / "task")


def _is_done(config: PruneConfig, folder: Path) -> bool:
    branches = config.task is not None and open_task(config.task).info.method == "adaptformer"
    return (folder / "model").exists() and (not branches or (folder / "task").exists())


def _tested(backbone: Backbone, config: PruneConfig, path: Path) -> dict[str, float]:
    """Return the share of right answers to the test pictures, if there are any."""
    if config.test is None:
        return {}
    test = Measurement(
        backbone, config.test, config.loop.batch_size, config.loop.workers, True,
        ladder=backbone.ladder, proportional=backbone.proportional,
    )  # fmt: skip

    def right(tokens: Tensor, classes: Tensor | None) -> Tensor:
        logits = test.logits(tokens, backbone.source)
        return compare(logits, logits, classes).sum(0)

    hits, *_ = test.total(path, [backbone.source], right).tolist()
    return {"top1": round(hits / test.count, 4)}


def _branches(backbone: Backbone) -> AdaptFormer | None:
    """Return the branches of a task as parameters."""
    if (adapter := backbone.adapter) is None:
        return None
    branches = AdaptFormer(len(adapter.branches), backbone.model.embed_dim, adapter.bottleneck, 1.0)
    with torch.no_grad():
        branches.down.copy_(torch.stack([down for down, _ in adapter.branches]))
        branches.up.copy_(torch.stack([up for _, up in adapter.branches]))
    return branches


@torch.no_grad()
def _rounded(network: nn.Module) -> Adapter | None:
    """Return the branches as they are written, in fp16."""
    assert isinstance(network, Network)
    if network.branches is None:
        return None
    pairs = network.branches().branches
    return Adapter([LowRank(down.half().float(), up.half().float()) for down, up in pairs])


def _task_tensors(backbone: Backbone) -> dict[str, Tensor]:
    """Return the heads and the branches under the names of a task folder, in fp16 on the CPU."""
    assert backbone.adapter is not None
    branches = backbone.adapter.branches
    tensors = {
        "adaptformer.down": torch.stack([down for down, _ in branches]),
        "adaptformer.up": torch.stack([up for _, up in branches]),
    }
    for head in heads_of(backbone.model):
        layer: Any = backbone.model.get_submodule(head)
        tensors |= {f"{head}.weight": layer.weight, f"{head}.bias": layer.bias}
    return {name: tensor.detach().cpu().half() for name, tensor in tensors.items()}
