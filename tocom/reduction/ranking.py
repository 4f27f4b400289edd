"""Which tokens come first."""

from torch import Tensor


def highest(score: Tensor, count: int) -> Tensor:
    """Return the positions [B, K] of the highest scores, falling; of equals the first.

    Args:
        score: [B, N].
        count: K, at most N.
    """
    return score.argsort(dim=1, descending=True, stable=True)[:, :count]
