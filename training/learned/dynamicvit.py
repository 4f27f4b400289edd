"""How DynamicViT learns which tokens to drop, although a choice has no gradient.

While it learns no token goes. At each stage every token that is still there is kept or dropped by
hard Gumbel-softmax, whose gradient is that of the soft one. From there on nobody but itself attends
to a token that was dropped.

Letters: B images, H heads, N tokens, P patch tokens, D channels.
Reference: DynamicViT, arXiv:2106.02034, sections 3.2 (masking) and 3.3 (losses).
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tocom import Backbone, ConfigError, Variant, forward_features, load_backbone
from tocom.adapter import Adapter
from tocom.attention import answer, look, project
from tocom.merging import unrounded
from tocom.reduction.learned import keep_votes
from tocom.vit import head
from training.config import DynamicViTConfig
from training.losses import kd_loss

#: Keeps a row of attention from dividing by nothing, as in the authors' code.
EPS = 1e-6


class Pruned(NamedTuple):
    """The answer of a forward in which tokens are dropped in attention only."""

    logits: Tensor  # [B, classes]
    masks: tuple[Tensor, ...]  # [B, P] of each stage: 1 for the tokens that are still there
    tokens: Tensor  # [B, P, D] patch tokens after the last norm, those that were dropped too


def pruned(model: VisionTransformer, x: Tensor, variant: Variant) -> Pruned:
    """Return the answer to embedded tokens x [B, N, D] as DynamicViT gives it while it learns.

    Args:
        model: a supported timm ViT.
        x: what `tocom.vit.embed` returned.
        variant: a rate of a ladder of DynamicViT, with its weights; how many tokens the rung keeps
            does not matter, only in which blocks it acts.
    """
    prefix = model.num_prefix_tokens
    cuts = variant.cuts(variant.plan(model, x.shape[1]))
    masks: list[Tensor] = []
    again = model.grad_checkpointing and torch.is_grad_enabled()
    for i, (block, cut) in enumerate(zip(model.blocks, cuts, strict=True)):
        if cut is not None:
            assert cut.learned is not None
            there = masks[-1] if masks else x.new_ones(x.shape[0], x.shape[1] - prefix)
            votes = keep_votes(x[:, prefix:], cut.learned, there.unsqueeze(-1))
            choice = F.gumbel_softmax(votes.float().log_softmax(dim=-1), hard=True)
            masks.append(choice[..., 0].to(x.dtype) * there)
        policy = F.pad(masks[-1], (prefix, 0), value=1.0) if masks else None
        run = (block, i, x, policy, variant.adapter)
        x = checkpoint(_run_block, *run, use_reentrant=False) if again else _run_block(*run)
    # What was dropped has no part in a mean of all tokens.
    size = F.pad(masks[-1], (prefix, 0), value=1.0).unsqueeze(-1) if masks else None
    final = model.norm(x)
    return Pruned(head(model, final, size), tuple(masks), final[:, prefix:])


def policy_attention(scores: Tensor, policy: Tensor) -> Tensor:
    """Return attention [B, H, N, N], in fp32, in which dropped tokens are seen by themselves only.

    Args:
        scores: [B, H, N, N] before softmax, scaled.
        policy: [B, N] 1 for the tokens that are there, 0 for those that were dropped.
    """
    seen = policy[:, None, None, :].float()
    itself = torch.eye(scores.shape[-1], device=scores.device)
    scores = scores.float()
    weights = (scores - scores.amax(dim=-1, keepdim=True)).exp() * (seen + (1 - seen) * itself)
    return (weights + EPS / scores.shape[-1]) / (weights.sum(dim=-1, keepdim=True) + EPS)


def _run_block(
    block: Block, i: int, x: Tensor, policy: Tensor | None, adapter: Adapter | None
) -> Tensor:
    """Run block `i`; without a policy as it is."""
    name = f"blocks.{i}.attn"
    seen = look(block.attn, name, block.norm1(x), None, None)
    if policy is None:
        y = answer(block.attn, name, seen, None)
    else:
        with unrounded(x):
            scores = (seen.q.float() * seen.scale) @ seen.k.float().transpose(-2, -1)
        weights = policy_attention(scores, policy).to(seen.v.dtype)
        y = project(block.attn, name, block.attn.attn_drop(weights) @ seen.v, None)
    x = x + block.drop_path1(block.ls1(y))
    left: Tensor = x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))
    return left if adapter is None else left + adapter(i, x)


def ratio_loss(masks: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
    """Return how far pictures are from the share of tokens to keep: mean square over stages.

    Args:
        masks: [B, P] of each stage.
        shares: of all patch tokens, to be left after each stage.
    """
    each = [(mask.mean(dim=1) - share) ** 2 for mask, share in zip(masks, shares, strict=True)]
    return torch.stack(each).mean()


def kept_token_loss(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """Return the mean squared error of the tokens that are kept; 0 if none is.

    Args:
        student, teacher: [B, P, D].
        mask: [B, P] 1 for those that are kept. It learns nothing from this error.
    """
    mask = mask.detach().float()
    errors = (student.float() - teacher.float()).square().mean(dim=2)
    return (errors * mask).sum() / mask.sum().clamp(min=1)


class Lesson:
    """What DynamicViT learns beside the labels."""

    def __init__(self, config: DynamicViTConfig, shares: Sequence[float], classes: int) -> None:
        """Load the teacher, if there is one.

        Args:
            config: weights of the losses and the teacher.
            shares: of all patch tokens, to be left after each stage.
            classes: of the task.
        """
        self.config, self.shares = config, shares
        self.teacher = open_teacher(config, classes)

    def __call__(self, answer: Pruned, images: Tensor) -> Tensor:
        """Return the losses of a batch [B, 3, H, W] beside that of its labels."""
        loss = self.config.ratio * ratio_loss(answer.masks, self.shares)
        if self.teacher is None:
            return loss
        model = self.teacher.model.to(images.device)
        with torch.no_grad():
            tokens = forward_features(model, images)
            logits = head(model, tokens, None)
        loss = loss + self.config.distillation * kd_loss(answer.logits, logits)
        if self.config.tokens:
            tokens = tokens[:, model.num_prefix_tokens :]
            error = kept_token_loss(answer.tokens, tokens, answer.masks[-1])
            loss = loss + self.config.tokens * error
        return loss


def open_teacher(config: DynamicViTConfig, classes: int) -> Backbone | None:
    """Load the model that teaches; None: there is none.

    Raises:
        BackboneError: if it cannot be loaded.
        ConfigError: if it is for another number of classes.
    """
    if config.teacher is None:
        return None
    teacher = load_backbone(config.teacher)
    if teacher.model.num_classes != classes:
        raise ConfigError(
            f"dynamicvit.teacher: {config.teacher} knows {teacher.model.num_classes} classes and "
            f"the pictures have {classes}: a teacher is tuned for the same task"
        )
    return teacher


def check_teacher(
    config: DynamicViTConfig, classes: int, backbone: Backbone, many: bool = False
) -> None:
    """Check a teacher against what it is to teach, pictures of one class or of many.

    Raises:
        BackboneError: if it cannot be loaded.
        ConfigError: if it sees pictures in another way, has other tokens, or is to teach answers
            where a picture has several classes.
    """
    teacher = open_teacher(config, classes)
    if teacher is None:
        return
    if many and config.distillation:
        raise ConfigError(
            "dynamicvit.teacher: answers are taught where a picture has one class; with several "
            "give dynamicvit.distillation=0"
        )
    for key in ("input_size", "mean", "std"):
        theirs, own = teacher.data_config[key], backbone.data_config[key]
        if tuple(theirs) != tuple(own):
            raise ConfigError(
                f"dynamicvit.teacher: {config.teacher} wants pictures with {key} {theirs}, "
                f"{backbone.name} with {own}"
            )
    one, other = (
        (each.patch_embed.num_patches, each.embed_dim) for each in (teacher.model, backbone.model)
    )
    if config.tokens and one != other:
        raise ConfigError(
            f"dynamicvit.teacher: {config.teacher} has {one[0]} tokens of {one[1]} channels and "
            f"{backbone.name} {other[0]} of {other[1]}: choose another, or dynamicvit.tokens=0"
        )
