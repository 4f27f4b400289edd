"""How well maps of classes fit: intersection over union, and the share of right pixels.

Letters: B pictures, K classes.
"""

from typing import Any

import torch
from torch import Tensor

#: The label of pixels that count nowhere.
IGNORED = 255


def counts(answer: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Return for each picture and class the pixels that are it in both maps, and in either.

    Args:
        answer, labels: [B, H, W] classes of pixels, as bytes; pixels whose label is `IGNORED` count
            nowhere.
        classes: K.

    Returns:
        [B, K, 2] intersections and unions.
    """
    found = []
    for mine, theirs in zip(answer.long(), labels.long(), strict=True):
        known = theirs != IGNORED
        pairs = theirs[known] * classes + mine[known]
        confusion = pairs.bincount(minlength=classes**2).view(classes, classes)
        both = confusion.diagonal()
        either = confusion.sum(dim=0) + confusion.sum(dim=1) - both
        found.append(torch.stack([both, either], dim=1))
    return torch.stack(found)


def figures(sums: Tensor, names: tuple[str, ...]) -> dict[str, Any]:
    """Return mIoU, pixel accuracy and the IoU of each class, in percent.

    The mean is over the classes that are in either map of any picture; others have no IoU.

    Args:
        sums: [K, 2] intersections and unions, summed over pictures.
        names: of the classes.
    """
    both, either = sums.double().unbind(dim=1)
    iou = 100 * both / either
    # A wrong pixel is in two unions, a right one in one.
    pixels = (both.sum() + either.sum()) / 2
    return {
        "miou": round(mean_iou(sums), 2),
        "pixel_accuracy": round(float(100 * both.sum() / pixels), 2),
        "iou": {
            name: None if each.isnan() else round(float(each), 2)
            for name, each in zip(names, iou, strict=True)
        },
    }


def mean_iou(sums: Tensor) -> float:
    """Return mIoU in percent of intersections and unions [K, 2]."""
    both, either = sums.double().unbind(dim=1)
    return float((100 * both / either).nanmean())


def error_of_difference(one: Tensor, other: Tensor, draws: int = 500) -> float:
    """Return the standard error of the difference in mIoU of two answers to the same pictures.

    By the bootstrap: pictures are drawn with replacement, for both answers the same.

    Args:
        one, other: [pictures, K, 2] intersections and unions.
        draws: of as many pictures as there are.
    """
    count = len(one)
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randint(count, (draws, count), generator=generator)
    times = torch.zeros(draws, count, dtype=torch.float64)
    times.scatter_add_(1, chosen, torch.ones_like(chosen, dtype=torch.float64))
    means = []
    for each in (one, other):
        both, either = torch.einsum("dp,pkc->cdk", times, each.double())
        means.append((100 * both / either).nanmean(dim=1))
    return float((means[0] - means[1]).std())
