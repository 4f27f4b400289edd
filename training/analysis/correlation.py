"""Correlation of two lists of numbers.

NaN where one of them is constant.
"""

from torch import Tensor


def pearson(x: Tensor, y: Tensor) -> float:
    """Return Pearson's correlation of x [N] and y [N]."""
    x, y = x.double() - x.double().mean(), y.double() - y.double().mean()
    return float((x * y).sum() / (x.square().sum() * y.square().sum()).sqrt())


def spearman(x: Tensor, y: Tensor) -> float:
    """Return Spearman's rho of x [N] and y [N]: Pearson's of their ranks, of equals the mean."""
    return pearson(_ranks(x), _ranks(y))


def kendall(x: Tensor, y: Tensor) -> float:
    """Return Kendall's tau-b of x [N] and y [N]."""
    x, y = _signs(x), _signs(y)
    return float((x * y).sum() / (x.square().sum() * y.square().sum()).sqrt())


def _ranks(x: Tensor) -> Tensor:
    below = (x.unsqueeze(1) > x).sum(dim=1)
    equal = (x.unsqueeze(1) == x).sum(dim=1)
    return below + (equal + 1) / 2


def _signs(x: Tensor) -> Tensor:
    """Return for every pair which is more [N, N]: 1, 0 or -1."""
    return (x.unsqueeze(1) - x).sign().double()
