"""Distilling a bank: the plug-ins learn to carry a backbone from any rate to any other.

A step draws rates source ≠ target. Teacher: the frozen backbone at rate `source`. Student: the
same backbone at rate `target` with Δ(source→target). The KL divergence from teacher to
student is the loss; no labels. No gradient is computed but the plug-ins': the backbone is
frozen, and nothing flows below the first of its blocks. A recipe may add what the head reads
(`features`) and the tokens after each block (`tokens`), which few pictures teach more by. It may
ask for a metric of the bank's own, which then learns in turn with the plug-ins: see
`learned.metric`.

Reference: Token Compensator (ToCom), arXiv:2408.06798, Algorithm 1 and section 3.3.
"""

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from timm.layers import DropPath, calculate_drop_path_rates
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from adapters import BackboneInfo, Bank, BankInfo, compose_steps
from adapters.bank import ladder_entries, plugin_shapes, tensor_shapes
from adapters.task import data_config, share
from tocom import Backbone, ConfigError, Delta, Ladder, Variant, load_backbone
from tocom.reduction import Place
from tocom.vit import Outputs, State, embed, outputs
from training import loop
from training.config import DistillConfig
from training.ladders.chosen import chosen_ladder
from training.learned.metric import Metric, metric_ladder
from training.losses import answer_loss, check_teaches, lesson
from training.pictures.augment import mixing
from training.pictures.batches import unlabelled
from training.pictures.unseen import mean_over
from training.run_folder import facts, refuse_other_run
from training.screen.header import header
from training.screen.progress import following, say
from training.seeds import derive

#: Pictures that tell what plain merging costs: the order of magnitude is what matters.
PLAIN_PICTURES = 24


class Plugins(nn.Module):
    """A bank's tensors as parameters. A starts random, B at zero: the first delta is none."""

    def __init__(self, info: BankInfo, basis: str = "own", metric: Metric | None = None) -> None:
        """Make the parameters that `info` describes.

        Args:
            info: of the bank.
            basis: `own`: each step has an A [rank, in] of its own; `shared`: all have the same.
            metric: that the bank has; None: it has none.
        """
        super().__init__()
        self.info, self.metric = info, metric
        self.steps = nn.ParameterDict()
        for name, shape in plugin_shapes(info).items():
            tensor = torch.zeros(shape)
            if name.endswith(".A"):
                if basis == "shared":
                    tensor = tensor[:1]
                # nn.Linear's own start, which the reference keeps: fan-in is the width.
                nn.init.uniform_(tensor, -1 / math.sqrt(shape[-1]), 1 / math.sqrt(shape[-1]))
            self.steps[_key(name)] = nn.Parameter(tensor)

    def tensors(self) -> dict[str, Tensor]:
        """Return the parameters under the bank's names; a shared A once for each step."""
        shapes = plugin_shapes(self.info)
        steps = {name: self.steps[_key(name)].expand(shape) for name, shape in shapes.items()}
        return steps if self.metric is None else steps | self.metric.tensors()

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

        Raises:
            ConfigError: if there is nothing to learn from, or the backbone scores several classes
                a picture.
        """
        check_teaches(backbone, config.features, config.tokens, "banks are distilled")
        self.config = config
        self.ladder = metric_ladder(chosen_ladder(config.ladder, backbone.model), config.metric)
        self.learned = backbone.learned
        if config.metric is None:
            self.ladder.check_learned(backbone.model, self.learned)
        shape, top = BackboneInfo.of(backbone), self.ladder.top
        if config.highest > (most := shape.geometry.patches if top is None else top):
            what = "the patches of a picture" if top is None else "its highest rung"
            raise ConfigError(
                f"max_rate ({config.max_rate}) + beyond ({config.beyond}) may be at most {most} on "
                f"the ladder {self.ladder.name!r}, {what}"
            )
        info = BankInfo(
            **ladder_entries(_up_to(self.ladder, config.highest)),
            name=config.name,
            backbone=shape,
            proportional=config.proportional,
            max_rate=config.highest,
            rank=config.rank,
            targets=config.targets,
            scale=config.scale,
        )
        torch.manual_seed(derive(config.loop.seed, "init", 0))
        self.plugins = Plugins(info, config.basis, self._metric(backbone.model, unseen))
        self.module: nn.Module = self.plugins
        self.teacher = backbone.model
        self.student = _student(backbone.model, config.drop_path)
        # The teacher may be the same model: it has no gradients, for which alone blocks run again.
        self.student.set_grad_checkpointing(config.loop.recompute_blocks)
        self.mixing = mixing(config.augment, classes=1, label_smoothing=0.0)
        self.traced = config.tokens > 0
        # Where no token leaves a block, dense answers are meant, which read all of them.
        self.whole = self.traced and self.ladder.method.place is Place.MLP
        self.losses_each = config.sources * config.students
        self.unseen = unseen
        self.plain = self._plain_losses() if config.relative else None  # [source, target]
        self.watched = sorted({max(1, config.max_rate * part // 4) for part in range(1, 5)})

    def losses(self, images: Tensor, labels: Tensor, micro: int) -> Iterator[Tensor]:
        """Yield the loss of each (source, target), weighted by its share of pictures.

        Teacher and students share what they have in common: the embedding; and all students of
        a source its teacher. In the first block their weights part.
        """
        if len(images) < self.config.sources:
            raise ConfigError(
                f"a micro-batch of {len(images)} pictures cannot be shared out to "
                f"{self.config.sources} sources; give a larger batch or fewer sources"
            )
        if self.mixing:
            images, _ = self.mixing(images, torch.zeros_like(labels))  # classes play no part
        shares = images.tensor_split(self.config.sources)
        for part, (source, targets) in zip(shares, self._rates(micro), strict=True):
            with torch.no_grad():
                tokens = embed(self.teacher, part)
            with torch.inference_mode():
                variant = self._variant(source)
                teacher = outputs(self.teacher, tokens, variant, self.traced, self.whole)
            teacher = _usable(teacher)
            weight = len(part) / len(images) / self.config.students
            for target in targets:
                delta = self.module(source, target, self.config.dropout)
                variant = self._variant(target, delta)
                if self._of_metric(micro):
                    assert self.plugins.metric is not None
                    variant = self.plugins.metric.soft(variant, self.student)
                student = outputs(self.student, tokens, variant, self.traced, self.whole)
                loss = weight * self._loss(student, teacher)
                if self.plugins.metric is not None:
                    # Several processes wait for the gradients of all parameters.
                    loss = loss + 0 * sum(each.sum() for each in self.plugins.parameters())
                yield loss if self.plain is None else loss / self.plain[source, target]

    def _variant(self, rate: int, delta: Delta | None = None) -> Variant:
        metric = self.plugins.metric
        learned = self.learned if metric is None else metric()
        return Variant(rate, delta, None, self.config.proportional, self.ladder, learned)

    def _metric(self, model: VisionTransformer, unseen: list[Tensor]) -> Metric | None:
        """Return the metric that is learned as it begins, on the device of the model."""
        if self.config.metric is None:
            return None
        images = unseen[0][:PLAIN_PICTURES].to(next(model.parameters()).device)
        return Metric(self.ladder, self.config.metric, model, images)

    def _of_metric(self, micro: int) -> bool:
        """Return whether the metric learns from a micro-batch, not the plug-ins."""
        metric = self.plugins.metric
        return metric is not None and metric.learns_in(micro, self.config.loop.seed)

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
        """Return the loss [source, target] without plug-ins, on the first unseen pictures."""
        images = self.unseen[0][:PLAIN_PICTURES].to(next(self.teacher.parameters()).device)
        tokens = embed(self.teacher, images)
        variants = [self._variant(rate) for rate in range(self.config.highest + 1)]
        say(f"measuring what each pair of {len(variants)} rates loses without plug-ins")
        plain = [
            outputs(self.teacher, tokens, variant, self.traced, self.whole)
            for variant in following(variants, "forwards", "rate")
        ]
        pairs = [(student, teacher) for teacher in plain for student in plain]
        losses = [self._loss(*pair) for pair in following(pairs, "losses", "pair")]
        found = torch.stack(losses).view(len(plain), len(plain)).cpu()  # waits for a GPU once
        # Rates that merge (nearly) alike must not outweigh all others.
        return found.clamp(min=found.max().item() / 1000 or 1.0)  # 0 where no pair loses anything

    def notes(self, micros: range) -> dict[str, Any]:
        """Return the pairs of rates, one for each loss."""
        rates = [rates for micro in micros for rates in self._rates(micro)]
        return {"pairs": [(source, target) for source, targets in rates for target in targets]}

    def _rates(self, micro: int) -> list[tuple[int, list[int]]]:
        first, config = micro * self.config.sources, self.config
        if self._of_metric(micro):
            config = config.model_copy(update={"from_zero": 1.0, "to_zero": 0.0})
        return [draw_rates(config, first + i) for i in range(config.sources)]

    def watch(self) -> dict[str, float]:
        """Return the loss against rate 0 with and without the bank, on unseen pictures.

        At each quarter of the ladder: the KL divergence, or the error of a model without a head.
        """
        if not self.unseen:
            return {}
        what = "kl" if self.teacher.num_classes else "error"
        names = [
            f"unseen_{what}_{rate}_{how}" for rate in self.watched for how in ("plain", "bank")
        ]
        device = next(self.plugins.parameters()).device
        found = mean_over(self.unseen, self._against_stock, len(names), device)
        return dict(zip(names, found.tolist(), strict=True))  # the one moment that waits for a GPU

    def _against_stock(self, images: Tensor) -> list[Tensor]:
        tokens = embed(self.teacher, images)
        stock = outputs(self.teacher, tokens, Variant())
        losses = []
        for rate in self.watched:
            for delta in (None, self.plugins(0, rate)):
                student = outputs(self.teacher, tokens, self._variant(rate, delta))
                losses.append(answer_loss(student, stock, self.teacher.num_classes > 0))
        return losses


def draw_rates(config: DistillConfig, draw: int) -> tuple[int, list[int]]:
    """Return the source and the distinct targets of a draw, as the recipe weighs the pairs."""
    generator = torch.Generator().manual_seed(derive(config.loop.seed, "pair", draw))
    rates = torch.arange(config.highest + 1)
    weights = (rates[:, None] - rates).abs().float()
    if config.pairs == "uniform":
        weights = weights.clamp(max=1)

    def pick(weights: Tensor, count: int = 1) -> list[int]:
        return torch.multinomial(weights, count, generator=generator).tolist() if count else []

    chance = torch.rand((), generator=generator).item()
    if chance < config.from_zero:
        return 0, pick(weights[0], config.students)
    if chance < config.from_zero + config.to_zero:
        (source,) = pick(weights[:, 0])
        others = weights[source].clone()
        others[0] = 0
        return source, [0, *pick(others, config.students - 1)]
    (source,) = pick(weights.sum(dim=1))
    return source, pick(weights[source], config.students)


def distill(config: DistillConfig, folder: Path) -> Path:
    """Distil a bank and return its folder.

    Raises:
        BackboneError, DataError, ConfigError: before any compute is spent.
        loop.TrainingError: if training cannot go on.
    """
    longer = refuse_other_run(folder, config)
    if (finished := folder / "bank").exists() and not longer:
        return finished
    say(f"loading {config.backbone.name}")
    backbone = load_backbone(config.backbone.name, config.backbone.architecture)
    backbone.model.pretrained_cfg |= data_config("crop", config.crop_pct)
    data = unlabelled(backbone, config)
    accelerator = loop.start(config.loop, folder)
    say(header(accelerator, config.loop, config.backbone, data.pictures, data.keys, folder))
    backbone.model.to(accelerator.device)
    job = Distillation(backbone, config, data.unseen)
    loop.run(
        accelerator, job, config.loop, config, data.pictures, data.keys, folder, config.augment
    )
    if accelerator.is_main_process:
        _bank(job, config, data.distinct, folder).save(finished)
    accelerator.wait_for_everyone()
    return finished


def _bank(job: Distillation, config: DistillConfig, distinct: int, folder: Path) -> Bank:
    """Return what was learned up to `max_rate`, in fp16, with notes on how."""
    training = facts(config, distinct, folder)
    update = ladder_entries(_up_to(job.ladder, config.max_rate))
    update |= {"max_rate": config.max_rate, "training": training}
    info = job.plugins.info.model_copy(update=update)
    if not Path(config.backbone.name).exists():  # a path says nothing elsewhere
        training["backbone"] = config.backbone.name
    steps, tensors = plugin_shapes(info), job.plugins.tensors()
    kept = {
        name: tensors[name][: config.max_rate] if name in steps else tensors[name]
        for name in tensor_shapes(info)
    }
    return Bank(info, {name: x.detach().cpu().half().contiguous() for name, x in kept.items()})


def _up_to(ladder: Ladder, top: int) -> Ladder:
    """Return a ladder that ends at a rung, if it has rungs."""
    return ladder if ladder.rungs is None else replace(ladder, rungs=ladder.rungs[: top + 1])


def _usable(teacher: Outputs) -> Outputs:
    """Copy what inference mode made, which cannot take part in a backward."""
    states = (
        State(each.x.clone(), None, None if each.source is None else each.source.clone(), None)
        for each in teacher.states
    )
    return Outputs(teacher.features.clone(), teacher.logits.clone(), tuple(states))


def _student(model: VisionTransformer, drop_path: float) -> VisionTransformer:
    """Return the same model with stochastic depth; its weights are those of `model`."""
    if drop_path == 0:
        return model
    student = share(model)
    rates = calculate_drop_path_rates(drop_path, len(student.blocks))
    for block, rate in zip(student.blocks, rates, strict=True):
        block.drop_path1 = DropPath(rate).train()
        block.drop_path2 = DropPath(rate).train()
    return student


def _key(name: str) -> str:
    """ParameterDict keys hold no dots."""
    return name.replace(".", "_")
