"""Soft merging, by which a metric learns: against a slow, plain one, and towards hard merging."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.tocom.reduction.learning import drawn_weights
from tests.tocom_models import pictures, small_model
from tocom import Ladder, ReductionWeights, Variant
from tocom.reduction import DTEM, options_of
from tocom.vit import embed, outputs
from training.learned.soft import SoftDTEM, soft_merge, soft_shares


def slow_shares(scores: Tensor, removed: int, temperature: float) -> Tensor:
    """One picture's, in double precision, element by element."""
    rows = [[math.exp(s / temperature) for s in row] for row in scores.double().tolist()]
    best = [math.log(sum(row)) for row in rows]
    low, high = min(best) - 50, max(best) + 50
    for _ in range(100):
        middle = (low + high) / 2
        if sum(1 / (1 + math.exp(middle - each)) for each in best) > removed:
            low = middle
        else:
            high = middle
    gives = [1 / (1 + math.exp(high - each)) for each in best]
    return torch.tensor(
        [[p * e / sum(row) for e in row] for p, row in zip(gives, rows, strict=True)]
    )


@pytest.mark.parametrize(("removed", "temperature"), [(1, 0.1), (3, 0.1), (4, 0.5), (2, 0.02)])
def test_shares_are_those_of_the_formula(removed: int, temperature: float) -> None:
    torch.manual_seed(removed)
    scores = torch.rand(2, 5, 4) * 2 - 1
    shares = soft_shares(scores, removed, temperature)
    for mine, one in zip(shares, scores, strict=True):
        torch.testing.assert_close(mine, slow_shares(one, removed, temperature), atol=1e-5, rtol=0)


@given(
    rows=st.integers(1, 9), columns=st.integers(1, 9), seed=st.integers(0, 2**32 - 1),
    temperature=st.sampled_from([0.01, 0.1, 1.0]), data=st.data(),
)  # fmt: skip
@settings(max_examples=30, deadline=None)
def test_shares_add_up_to_what_merges_and_nobody_gives_more_than_itself(
    rows: int, columns: int, seed: int, temperature: float, data: st.DataObject
) -> None:
    removed = data.draw(st.integers(1, rows))
    scores = torch.rand(2, rows, columns, generator=torch.Generator().manual_seed(seed))
    shares = soft_shares(scores, removed, temperature)
    assert (shares >= 0).all()
    assert (shares.sum(dim=2) <= 1 + 1e-5).all()
    torch.testing.assert_close(shares.sum(dim=(1, 2)), torch.full((2,), float(removed)))
    # How alike all are says nothing.
    torch.testing.assert_close(
        shares, soft_shares(scores + 0.3, removed, temperature), atol=1e-3, rtol=0
    )


def test_the_gradient_of_the_shares_is_that_of_the_formula() -> None:
    torch.manual_seed(0)
    scores = torch.rand(2, 5, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s: soft_shares(s, 2, 0.3), scores, atol=1e-6)


@pytest.mark.parametrize("prefix", [0, 1, 2])
def test_soft_merging_is_that_of_the_formula_and_keeps_all_sizes(prefix: int) -> None:
    torch.manual_seed(prefix)
    x, size, weight = torch.randn(2, 9, 3), 1 + torch.rand(2, 9, 1), 1 + torch.rand(2, 9, 1)
    a = [i for i in range(prefix, 9) if i % 2 == 0]
    b = [i for i in range(prefix, 9) if i % 2]
    shares = torch.rand(2, len(a), len(b)) / len(b)
    merged = soft_merge(x, size, weight, shares, prefix)
    torch.testing.assert_close(merged.size.sum(1), size.sum(1))
    expected_x, expected_size = x.clone(), size.clone()
    for n in range(2):
        for j, to in enumerate(b):
            given = [shares[n, i, j] for i in range(len(a))]
            whole = weight[n, to] + sum(g * weight[n, i] for g, i in zip(given, a, strict=True))
            total = weight[n, to] * x[n, to]
            total = total + sum(g * weight[n, i] * x[n, i] for g, i in zip(given, a, strict=True))
            expected_x[n, to] = total / whole
            expected_size[n, to] += sum(g * size[n, i] for g, i in zip(given, a, strict=True))
        for i, start in enumerate(a):
            expected_size[n, start] *= 1 - shares[n, i].sum()
    torch.testing.assert_close(merged.x, expected_x)
    torch.testing.assert_close(merged.size, expected_size)


def soft(variant: Variant, removed: tuple[int, ...], temperature: float) -> Variant:
    """A variant of DTEM as it runs while it learns."""
    method = SoftDTEM(**options_of(variant.ladder.method), temperature=temperature, removed=removed)
    assert variant.learned is not None
    learned = ReductionWeights(method, variant.learned.tensors)
    return replace(variant, ladder=replace(variant.ladder, method=method), learned=learned)


@pytest.mark.parametrize("kind", ["vit_tiny", "deit_tiny_distilled", "global_pool"])
@pytest.mark.parametrize("options", [{}, {"importance": 0.05, "weight": "class"}, {"size": 0.05}])
def test_towards_no_temperature_soft_merging_is_hard_merging(
    kind: str, options: dict[str, object]
) -> None:
    model = small_model(kind)
    ladder = Ladder("soft", DTEM(**options, channels=8), ((0, 0, 0), (3, 2, 4)), 16)  # type: ignore[arg-type]
    variant = Variant(1, ladder=ladder, learned=drawn_weights(ladder, model))
    x = embed(model, pictures(model))
    removed = variant.plan(model, x.shape[1]).removed
    hard = outputs(model, x, variant, trace=True, whole=True)
    mine = outputs(model, x, soft(variant, removed, 1e-5), trace=True, whole=True)
    torch.testing.assert_close(mine.logits, hard.logits, atol=1e-4, rtol=1e-4)
    for ours, theirs in zip(mine.states, hard.states, strict=True):
        count = theirs.x.shape[1]
        assert ours.x.shape[1] == x.shape[1]  # those that have merged away follow behind
        torch.testing.assert_close(ours.x[:, :count], theirs.x, atol=1e-3, rtol=1e-3)
        assert ours.source is not None
        assert theirs.source is not None
        assert torch.equal(ours.source, theirs.source)
        assert ours.size is not None
        assert (ours.size[:, count:] < 1e-3).all()


def test_gradients_reach_the_metric_of_each_block_and_nothing_else() -> None:
    model = small_model("global_pool")
    ladder = Ladder("soft", DTEM(channels=8), ((0, 0, 0), (3, 2, 4)), 16)
    drawn = drawn_weights(ladder, model)
    assert drawn is not None
    weights = {name: x.requires_grad_() for name, x in drawn.tensors.items()}
    variant = soft(
        Variant(1, ladder=ladder, learned=ReductionWeights(ladder.method, weights)), (3, 2, 4), 0.1
    )
    x = embed(model, pictures(model)).requires_grad_()
    outputs(model, x, variant).logits.square().sum().backward()  # type: ignore[no-untyped-call]
    for name, weight in weights.items():
        assert weight.grad is not None, name
        assert weight.grad.abs().max() > 0, name
