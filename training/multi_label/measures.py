"""What is measured where a picture has several classes.

Each class is a question of its own, answered by the sigmoid of its logit.

Letters: P pictures, C classes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

#: Whoever scores more than this counts as an answer.
THRESHOLD = 0.5


def average_precision(scores: Tensor, truth: Tensor) -> Tensor:
    """Return the average precision [C] of each class; NaN where no picture has it.

    The mean, over the pictures that have the class, of the precision among those that score as
    high: as scikit-learn's `average_precision_score`, nothing is interpolated, and pictures of the
    same score are in or out together.

    Args:
        scores: [P, C] any that rise with how likely a class is, such as logits.
        truth: [P, C] whether a picture has a class.
    """
    ordered, order = scores.sort(dim=0, descending=True)
    found = truth.bool().gather(0, order)
    place = torch.arange(len(scores), device=scores.device).unsqueeze(1)
    precision = found.cumsum(dim=0) / (place + 1.0)
    # Of equals only the last has seen all of them.
    last = torch.ones_like(found)
    last[:-1] = ordered[:-1] != ordered[1:]
    ends = torch.where(last, place, len(scores)).flip(0).cummin(dim=0).values.flip(0)
    return (precision.gather(0, ends) * found).sum(dim=0) / found.sum(dim=0)


def mean_average_precision(scores: Tensor, truth: Tensor) -> float:
    """Return the mean of the average precision over the classes that some picture has."""
    return float(average_precision(scores, truth).nanmean())


def compare_many(answer: Tensor, reference: Tensor) -> Tensor:
    """Return how near each picture's answer is to another, in the order of `MEASURES`.

    Args:
        answer, reference: logits [B, C].

    Returns:
        [B, 3]: 0, for top-1 there is none; whether the same classes are above the threshold; the
        sum over the classes of KL(reference ‖ answer) in nats.
    """
    answer, reference = answer.float(), reference.float()
    likely = reference.sigmoid()
    gap = F.logsigmoid(reference) - F.logsigmoid(answer)
    other = F.logsigmoid(-reference) - F.logsigmoid(-answer)
    kl = (likely * gap + (1 - likely) * other).sum(dim=-1)
    same = ((answer.sigmoid() > THRESHOLD) == (likely > THRESHOLD)).all(dim=-1)
    return torch.stack([torch.zeros_like(kl).double(), same.double(), kl.double()], dim=-1)
