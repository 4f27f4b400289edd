"""What a student is to match: the teacher's logits, and its tokens on the way to them."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from tocom import Backbone, ConfigError
from tocom.vit import Outputs, State
from training.measuring import MANY_CLASSES


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


def answer_loss(student: Outputs, teacher: Outputs, logits: bool) -> Tensor:
    """Return how far answers are apart: the KL divergence, without a head the features' error."""
    if logits:
        return kd_loss(student.logits, teacher.logits)
    return F.mse_loss(student.features, teacher.features)


def check_teaches(backbone: Backbone, features: float, tokens: float, what: str) -> None:
    """Check that a student can learn from what a backbone says.

    Args:
        backbone: the teacher.
        features, tokens: weights, as of `lesson`.
        what: what is made, such as "banks are distilled".

    Raises:
        ConfigError: if there is nothing to learn from, or it scores several classes a picture.
    """
    if backbone.multi_label:
        raise ConfigError(f"{backbone.name} {MANY_CLASSES}; {what} for models that answer one")
    if not backbone.model.num_classes and not features and not tokens:
        raise ConfigError(
            f"{backbone.name} has no head, so there are no logits to learn from; "
            "give its features or its tokens a weight: features=1.0, tokens=1.0"
        )


def lesson(
    student: Outputs, teacher: Outputs, logits: bool, features: float, tokens: float
) -> Tensor:
    """Return what a student has yet to learn: a sum of terms.

    Args:
        student, teacher: of the same pictures; traced, if there is a weight of tokens.
        logits: whether there is a head; the KL divergence of what it says is a term then.
        features: weight of the squared error of what a head reads.
        tokens: weight of the relative squared error of the tokens after each block.
    """
    terms = []
    if logits:
        terms.append(kd_loss(student.logits, teacher.logits))
    if features:
        error = F.mse_loss(student.features.float(), teacher.features.float())
        terms.append(features * error)
    if tokens:
        terms.append(tokens * token_error(student.states, teacher.states))
    return torch.stack(terms).sum()


def token_error(student: Sequence[State], teacher: Sequence[State]) -> Tensor:
    """Return the mean over blocks of the squared error of the tokens, relative to their variance.

    Both have merged tokens, not the same ones. The side with fewer says what is compared: each
    of its tokens with the mean, over the input tokens that it stands for, of the other side's.

    Args:
        student, teacher: what `tocom.vit.outputs` traced, of the same pictures.
    """
    errors = []
    for mine, theirs in zip(student, teacher, strict=True):
        if mine.x.shape[1] <= theirs.x.shape[1]:
            pair = mine.x, _regroup(theirs, mine)
        else:
            pair = _regroup(mine, theirs), theirs.x
        error = F.mse_loss(pair[0].float(), pair[1].float())
        errors.append(error / theirs.x.float().var())
    return torch.stack(errors).mean()


def _regroup(state: State, groups: State) -> Tensor:
    """Return, for each token of `groups`, the mean of what `state` made of its input tokens.

    Where `state` dropped all of them, the token of `groups` itself: there is nothing to compare.
    """
    assert state.source is not None
    assert groups.source is not None
    (batch, tokens, width), count = state.x.shape, groups.x.shape[1]
    image = torch.arange(batch, device=state.x.device).unsqueeze(1)
    # Whole rows at a time, as tokens are merged.
    held = (state.source.clamp(min=0) + tokens * image).flatten()
    # What either side dropped goes to a row of its own, behind all others.
    dropped = (state.source < 0) | (groups.source < 0)
    into = (groups.source + count * image).masked_fill(dropped, batch * count).flatten()
    of_inputs = state.x.reshape(batch * tokens, width).index_select(0, held)
    sums = of_inputs.new_zeros(batch * count + 1, width).index_add_(0, into, of_inputs)
    # Not bincount, which a GPU waits for.
    sizes = into.new_zeros(batch * count + 1).index_add_(0, into, torch.ones_like(into))
    sums, sizes = sums[:-1].view(batch, count, width), sizes[:-1].view(batch, count, 1)
    return torch.where(sizes > 0, sums / sizes.clamp(min=1), groups.x)
