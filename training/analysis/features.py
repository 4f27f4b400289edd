"""How alike two models represent the same pictures.

Features are of C channels by P pictures; two of the same pictures may have different C. `centred`
comes first.
Reference: Which Tokens to Use?, arXiv:2308.04657, section 5, after Ding et al., arXiv:2108.01661.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Canonical(NamedTuple):
    """What canonical correlation says."""

    mean: float  # correlation; 1: alike
    mean_squared: float
    distance: float  # weighted by what the first's features project on (PWCCA); 0: alike


def centred(features: Tensor) -> Tensor:
    """Return features [C, P] in fp64 with a mean of 0 in each channel and a norm of 1 in all."""
    features = features.double()
    features = features - features.mean(dim=1, keepdim=True)
    scaled: Tensor = features / torch.linalg.matrix_norm(features)
    return scaled


def procrustes(a: Tensor, b: Tensor) -> float:
    """Return the squared distance of a [C, P] and b [C', P] after the best rotation."""
    nuclear = torch.linalg.matrix_norm(a @ b.T, "nuc")
    return float(a.square().sum() + b.square().sum() - 2 * nuclear)


def cka(a: Tensor, b: Tensor) -> float:
    """Return the distance of a [C, P] and b [C', P] by linear CKA: 0 alike, 1 at most."""
    norm = torch.linalg.matrix_norm
    return float(1 - norm(b @ a.T) ** 2 / (norm(a @ a.T) * norm(b @ b.T)))


def canonical(a: Tensor, b: Tensor) -> Canonical:
    """Return the canonical correlation of a [C, P] and b [C', P]; P must be more than C and C'."""
    white_a, white_b = _white(a), _white(b)
    turn, rho, _ = torch.linalg.svd(white_a @ white_b.T)
    rho = rho.clamp(max=1)
    vectors = turn.T @ white_a  # the canonical ones of a
    weight = (vectors @ a.T).abs().sum(dim=1)
    weight = weight / weight.sum()
    distance = 1 - (weight[: len(rho)] * rho).sum()
    return Canonical(float(rho.mean()), float(rho.square().mean()), float(distance))


def _white(features: Tensor) -> Tensor:
    """Return an orthonormal basis [rank, P] of the rows of features [C, P]."""
    _, values, basis = torch.linalg.svd(features, full_matrices=False)
    # As numpy's rank: what is smaller is rounding.
    least = values.max() * max(features.shape) * torch.finfo(features.dtype).eps
    white: Tensor = basis[values > least]
    return white
