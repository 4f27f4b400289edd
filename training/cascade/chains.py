"""All chains of runs and their thresholds, and what they come to on some pictures.

Knows what answers agree and how sure they were, not where they are from.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from adapters.cascade import CascadePoint, frontier

#: Thresholds that are tried at a run, quantiles of the pictures' margins; of three runs that is
#: 80 x 80 pairs.
_TRIED = 80
#: Larger shares than this run again to no avail: the next run alone is cheaper.
_AGAIN = 0.7
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Runs:
    """What some pictures came to at some rates.

    Attributes:
        rates: the cheapest first; the last one is what the others are compared to.
        shares: [R] multiply-adds compared to the last rate.
        margins: [P, R] how sure the answers are.
        agree: [P, R] whether they are as at the last rate.
    """

    rates: tuple[int, ...]
    shares: tuple[float, ...]
    margins: Tensor
    agree: Tensor

    def measure(self, point: CascadePoint) -> CascadePoint:
        """Return a point as it does on these pictures."""
        waits = torch.ones(len(self.agree), dtype=torch.bool)
        agreed, spent = 0, 0.0
        for rate, threshold in zip(point.rates, (*point.thresholds, 0.0), strict=True):
            run = self.rates.index(rate)
            spent += self.shares[run] * int(waits.sum())
            ends = waits & (self.margins[:, run] >= threshold)
            agreed += int((ends & self.agree[:, run]).sum())
            waits &= ~ends
        count = len(self.agree)
        return point.model_copy(update={"agreement": agreed / count, "share": spent / count})


def best_points(runs: Runs, longest: int, agreements: Sequence[float]) -> tuple[CascadePoint, ...]:
    """Return the cheapest point for each agreement, of all chains and thresholds.

    Args:
        runs: of the pictures that decide.
        longest: runs that a chain has at most.
        agreements: shares of pictures; the last rate by itself, which agrees always, comes after.
    """
    found: list[CascadePoint] = []
    for count in range(1, longest + 1):
        for chain in itertools.combinations(range(len(runs.rates)), count):
            found += _points(runs, chain, (*agreements, 1.0))
    edge = frontier(found)
    kept = [
        next(point for point in edge if point.agreement >= asked - _ROUNDING)
        for asked in sorted((*agreements, 1.0))
    ]
    return tuple(dict.fromkeys(kept))


def _points(
    runs: Runs, chain: tuple[int, ...], agreements: Sequence[float]
) -> Iterator[CascadePoint]:
    """Yield the cheapest point of a chain for each agreement that it reaches."""
    edges = [_edges(runs.margins[:, run]) for run in chain[:-1]]
    bins = [
        torch.searchsorted(edge, runs.margins[:, run].contiguous(), right=True)
        for edge, run in zip(edges, chain, strict=False)
    ]

    def come(place: int, weights: Tensor) -> Tensor:
        """Return the weight of pictures that come to a run, with an axis for each threshold."""
        table = _below(bins[:place], edges[:place], weights)
        return table.reshape((*table.shape, *[1] * (len(edges) - place)))

    count = len(runs.agree)
    agreed = spent = torch.zeros((), dtype=torch.float64)
    for place, run in enumerate(chain):
        agree = runs.agree[:, run].double()
        spent = spent + runs.shares[run] * come(place, torch.ones_like(agree))
        agreed = agreed + come(place, agree)
        if place < len(edges):  # less those that go on
            agreed = agreed - come(place + 1, agree)
    # Rate 0 by itself agrees by definition, all else as far as so few pictures tell.
    only_last = chain == (len(runs.rates) - 1,)
    agreement = agreed / count if only_last else at_least(agreed / count, count)
    share = (spent / count).expand(agreement.shape)
    for asked in agreements:
        if not (enough := agreement >= asked - _ROUNDING).any():
            return
        best = int(share.masked_fill(~enough, math.inf).argmin())
        yield CascadePoint(
            rates=tuple(runs.rates[run] for run in chain),
            thresholds=tuple(
                0.0 if choice == 0 else float(edge[choice - 1])
                for choice, edge in zip(np.unravel_index(best, agreement.shape), edges, strict=True)
            ),
            agreement=round(float(agreement.flatten()[best]), 6),
            share=round(float(share.flatten()[best]), 6),
        )


def at_least(agreement: Tensor, count: int) -> Tensor:
    """Return what a share of `count` pictures is at least, but for one chance in six.

    Wilson's lower bound at one standard error. Without it few pictures would promise too much:
    what never failed on a hundred of them may fail on the next.
    """
    spread = (agreement * (1 - agreement) / count + 1 / (4 * count**2)).sqrt()
    return (agreement + 1 / (2 * count) - spread) / (1 + 1 / count)


def _edges(margins: Tensor) -> Tensor:
    """Return thresholds to try."""
    edges = torch.quantile(margins.double(), torch.linspace(0, _AGAIN, _TRIED + 1).double()[1:])
    return edges.to(margins.dtype)


def _below(bins: Sequence[Tensor], edges: Sequence[Tensor], weights: Tensor) -> Tensor:
    """Return the weight of pictures below all of some thresholds, for each choice of these.

    Args:
        bins: of each run, how many of its edges a picture reaches [P].
        edges: of each run [E]; choice 0 is a threshold that all pictures reach, choice e is edge
            e - 1.
        weights: [P].

    Returns:
        [E + 1, ...], an axis for each run; a scalar, the weight of all, without any.
    """
    if not bins:
        return weights.sum()
    sizes = [len(edge) + 1 for edge in edges]
    flat = torch.zeros_like(bins[0])
    for each, size in zip(bins, sizes, strict=True):
        flat = flat * size + each
    table = torch.bincount(flat, weights, math.prod(sizes)).reshape(sizes)
    for axis in range(len(sizes)):
        table = table.cumsum(axis)
        table = torch.cat(
            [torch.zeros_like(table.narrow(axis, 0, 1)), table.narrow(axis, 0, sizes[axis] - 1)],
            axis,
        )
    return table
