"""How alike two reductions of the same pictures are, by where their patches went.

A map says of each patch which token holds it; -1: none, it was dropped.

Letters: P pictures, N patches.
Reference: Which Tokens to Use?, arXiv:2308.04657, section 5.
"""

from typing import NamedTuple

import torch
from torch import Tensor

_ROUNDING = 1e-12  # of entropies that are 0


class Overlap(NamedTuple):
    """How much two sets of patches have in common; NaN where a set that is divided by is empty."""

    iou: Tensor  # [P] of the patches that are in either, the share in both
    ioa: Tensor  # [P] of the second's, the share that is the first's too


class Agreement(NamedTuple):
    """How much one clustering says of another, from 0 to 1; NaN where no patch is in both."""

    homogeneity: Tensor  # [P] how much the second says of the first
    completeness: Tensor  # [P] how much the first says of the second
    nmi: Tensor  # [P] normalised mutual information: their harmonic mean


def kept(held: Tensor) -> Tensor:
    """Return which patches [P, N] are still tokens of their own.

    Args:
        held: [P, N] the token that holds each patch.
    """
    places = held.long() + 1
    counts = torch.zeros(len(held), int(places.max()) + 1, dtype=torch.long)
    counts.scatter_add_(1, places, torch.ones_like(places))
    return (counts.gather(1, places) == 1) & (held >= 0)


def overlap(first: Tensor, second: Tensor) -> Overlap:
    """Compare the patches [P, N] that two reductions keep; of two rates the second is cheaper."""
    both, either = (each.sum(dim=1).double() for each in (first & second, first | second))
    return Overlap(both / either, both / second.sum(dim=1))


def agreement(first: Tensor, second: Tensor) -> Agreement:
    """Compare two maps [P, N] as clusterings of the patches that neither dropped.

    Of two rates the first is the cheaper.
    """
    both = (first >= 0) & (second >= 0)
    first, second = first.clamp(min=0).long(), second.clamp(min=0).long()
    pair = first * (1 + int(second.max())) + second
    one, other, joint = (_entropy(each, both) for each in (first, second, pair))
    homogeneity = _explained(one, joint - other)
    completeness = _explained(other, joint - one)
    total = homogeneity + completeness
    nmi = torch.where(total > 0, 2 * homogeneity * completeness / total, total)
    return Agreement(homogeneity, completeness, nmi)


def _explained(whole: Tensor, left: Tensor) -> Tensor:
    """Return the share of an entropy that is not left; all of none."""
    return torch.where(whole.abs() < _ROUNDING, 1.0, 1 - left / whole)


def _entropy(labels: Tensor, counted: Tensor) -> Tensor:
    """Return the entropy [P], in nats, of the labels [P, N] of the patches that are counted."""
    rows = torch.arange(len(labels)).unsqueeze(1) * (1 + labels.max())
    _, place, counts = torch.unique(
        (rows + labels).masked_fill(~counted, -1), return_inverse=True, return_counts=True
    )
    alike = counts[place].double()  # how many patches have the label of each
    total = counted.sum(dim=1).double()
    entropy: Tensor = total.log() - (alike.log() * counted).sum(dim=1) / total
    return entropy
