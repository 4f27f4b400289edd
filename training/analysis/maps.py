"""How alike two depth maps are: how far each patch of the grid comes as a token of its own.

Maps are [rows, columns], not negative. Where a measure has no value, such as KL from a map that has
a 0 where the other has none, it is infinite or NaN.
Reference: Which Tokens to Use?, arXiv:2308.04657, section 5; Bylinskii et al., arXiv:1604.03605.
"""

import numpy as np
import torch
from torch import Tensor

Array = np.ndarray[tuple[int, ...], np.dtype[np.float64]]
_ROUNDING = 1e-12  # of masses that sum to 1


def kl(first: Tensor, second: Tensor) -> float:
    """Return KL(second ‖ first) in bits of two maps as distributions."""
    first, second = _distribution(first), _distribution(second)
    return float(torch.special.xlogy(second, second / first).sum() / np.log(2))


def js(first: Tensor, second: Tensor) -> float:
    """Return the divergence in bits of two maps from their mean, as distributions.

    As the survey's code has it: each is KL(mean ‖ map), where Jensen and Shannon have KL(map ‖
    mean).
    """
    first, second = _distribution(first), _distribution(second)
    middle = (first + second) / 2
    return (kl(first, middle) + kl(second, middle)) / 2


def similarity(first: Tensor, second: Tensor) -> float:
    """Return the mass that two maps share, each from its least to its most and of mass 1."""
    shared = torch.minimum(_distribution(first - first.min()), _distribution(second - second.min()))
    return float(shared.sum())


def earth_movers(first: Tensor, second: Tensor) -> float:
    """Return the least work that makes one map of the other: mass 1, distance in patches."""
    change = (_distribution(first) - _distribution(second)).flatten().numpy()
    rows, columns = first.shape
    at = np.stack(np.divmod(np.arange(rows * columns), columns), axis=1)
    # What both have stays where it is: distances obey the triangle inequality.
    heaps, holes = change > 0, change < 0
    distance = np.linalg.norm(at[heaps, None] - at[None, holes], axis=2)
    return transport(change[heaps], -change[holes], distance)


def transport(supply: Array, demand: Array, cost: Array) -> float:
    """Return the least cost of carrying all supply [S] to demand [D] at cost [S, D] a unit.

    By shortest augmenting paths with potentials, of which each ends a supply, a demand or a way.
    """
    supply, demand, flow = supply.copy(), demand.copy(), np.zeros_like(cost)
    up, down = np.zeros(len(supply)), np.zeros(len(demand))
    while min(supply.sum(), demand.sum()) > _ROUNDING:
        slack = np.maximum(cost + up[:, None] - down, 0)  # what a way costs beyond the potentials
        near_s = np.where(supply > 0, 0.0, np.inf)
        came_s = np.full(len(supply), -1)
        reach = near_s[:, None] + slack
        came_d = reach.argmin(axis=0)
        near_d = reach[came_d, np.arange(len(demand))]
        done = np.zeros(len(demand), dtype=bool)
        while True:
            j = int(np.where(done, np.inf, near_d).argmin())
            done[j] = True
            if demand[j] > 0:
                break
            for i in map(int, np.flatnonzero((flow[:, j] > 0) & np.isinf(near_s))):
                near_s[i], came_s[i] = near_d[j], j
                closer = (near_s[i] + slack[i] < near_d) & ~done
                near_d[closer], came_d[closer] = near_s[i] + slack[i, closer], i
        end = near_d[j]
        up += np.minimum(near_s, end)
        down += np.minimum(near_d, end)
        path, amount = [], demand[j]
        while True:
            i = int(came_d[j])
            path.append((i, j, 1.0))
            if came_s[i] < 0:
                break
            j = int(came_s[i])
            path.append((i, j, -1.0))
            amount = min(amount, flow[i, j])
        amount = min(amount, supply[i])
        for s, d, sign in path:
            flow[s, d] += sign * amount
        supply[i] -= amount
        demand[path[0][1]] -= amount
    return float((flow * cost).sum())


def _distribution(values: Tensor) -> Tensor:
    values = values.double()
    return values / values.sum()
