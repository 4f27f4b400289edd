"""Which channels go, against the golden cases and a slow reference."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests import oracle_case
from training.prune.selection import Freed, Scores, select


def draw(seed: int, blocks: int = 2, heads: int = 3, channels: int = 4, hidden: int = 5) -> Scores:
    generator = torch.Generator().manual_seed(seed)
    q, k, v = torch.rand(3, blocks, heads, channels, generator=generator)
    return Scores(q, k, v, torch.rand(blocks, hidden, generator=generator))


def slow_select(scores: Scores, freed: Freed, wanted: float) -> list[tuple[int, int, int, int]]:
    """Look through everything that is left for each choice; return what goes, in its order."""
    qk = (scores.q + scores.k) / 2
    left: dict[tuple[int, int, int, int], float] = {}
    for kind, each in enumerate((qk, scores.v, scores.fc1.unsqueeze(1))):
        for block, head, channel in (each > -1).nonzero().tolist():
            left[block, kind, head, channel] = float(each[block, head, channel])

    def inside(block: int, kind: int, head: int) -> list[tuple[int, int, int, int]]:
        return [place for place in left if place[:3] == (block, kind, head)]

    order, total = [], 0
    while total < wanted:
        free = [place for place in left if len(inside(*place[:3])) > 1]
        if not free:
            break
        block, kind, *_ = min(free, key=lambda place: left[place])
        heads = 1 if kind == 2 else scores.q.shape[1]
        for head in range(heads):
            least = min(inside(block, kind, head), key=lambda place: left[place])
            del left[least]
            order.append(least)
            total += freed[kind][block]
    return order


@pytest.mark.parametrize("name", ["cdcp_1", "cdcp_2"])
def test_the_golden_cases(name: str) -> None:
    params, case = oracle_case.read(f"reduction/{name}")
    scores = Scores(*(case[f"score_{part}"] for part in ("q", "k", "v", "fc1")))
    (blocks, heads, channels), hidden = scores.q.shape, scores.fc1.shape[1]
    tokens, width = params["N"], params["d"]
    pair = 2 * tokens * width + tokens**2
    freed = Freed([pair] * blocks, [pair] * blocks, [2 * tokens * width] * blocks)
    whole = blocks * (2 * heads * channels * pair + hidden * 2 * tokens * width)
    found = select(scores, freed, params["target"] * whole)
    assert [list(place) for place in found.order] == case["order"].tolist()
    for kept, expected in zip(found.kept, ("qk", "v", "fc1"), strict=True):
        assert torch.equal(kept, case[f"keep_{expected}"])
    assert found.freed / whole == pytest.approx(float(case["freed_fraction"]), abs=1e-9)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("wanted", [0, 1, 90, 250, 10**6])
def test_it_is_what_a_slow_search_takes(seed: int, wanted: float) -> None:
    scores, freed = draw(seed), Freed([7, 5], [6, 8], [3, 4])
    found = select(scores, freed, wanted)
    assert found.order == slow_select(scores, freed, wanted)
    assert found.freed == sum(freed[kind][block] for block, kind, _, _ in found.order)


def counts(kept: Tensor) -> list[Any]:
    return kept.sum(-1).tolist()


def test_heads_stay_alike_and_none_loses_its_last_channel() -> None:
    scores, freed = draw(9), Freed([1, 1], [1, 1], [1, 1])
    for wanted in range(0, 60, 7):
        kept = select(scores, freed, wanted).kept
        for part in (kept.qk, kept.v):
            assert all(len(set(heads)) == 1 for heads in counts(part))
    assert counts(kept.qk) == counts(kept.v) == [[1, 1, 1], [1, 1, 1]]
    assert counts(kept.fc1) == [1, 1]


def test_of_equals_the_first_goes() -> None:
    ones = torch.ones(1, 2, 3)
    found = select(Scores(ones, ones, ones, torch.ones(1, 4)), Freed([1], [1], [1]), 3)
    assert found.order == [(0, 0, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1), (0, 0, 1, 1)]
