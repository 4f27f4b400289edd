"""MCTF: against plain loops, properties, and its cost."""

import pytest
import torch
from hypothesis import assume, given

from tests.tocom.reduction.slow_methods import (
    cuts,
    one_image,
    seen_at_random,
    slow_attention_of,
    slow_means,
)
from tocom.reduction import MCTF, Cut, Tokens


def slow_groups(keys, received, sizes, r, prefix):
    """Return which tokens each output token of one image holds: the paper's product."""
    rows = [row / row.norm() for row in keys.double()]
    calm, small = 1 / received, 1 / sizes.double()
    calm, small = calm / calm.max(), small / small.max()

    def score(i, j):
        alike = float((1 + rows[i] @ rows[j]) / 2)
        return alike * float(calm[i] * calm[j]) ** (1 / 20) * float(small[i] * small[j]) ** (1 / 40)

    def paired(ones, others, count):
        best = {i: max(others, key=lambda j: score(i, j)) for i in ones} if count else {}
        ranked = sorted(best, key=lambda i: score(i, best[i]), reverse=True)
        return {i: best[i] for i in ranked[:count]}

    set_a = [i for i in range(prefix, len(rows)) if i % 2 == 0]
    set_b = [i for i in range(prefix, len(rows)) if i % 2 == 1]
    into = paired(set_a, set_b, r - r // 2)
    rest_a = [i for i in set_a if i not in into]
    back = paired(set_b, rest_a, r // 2)
    order = [*range(prefix), *rest_a, *(j for j in set_b if j not in back)]
    into |= back

    def end(i):
        return end(into[i]) if i in into else i

    return [[i for i in range(len(rows)) if end(i) == out] for out in order]


@given(cuts(most=lambda patches: patches // 2))
def test_it_is_what_plain_loops_say(drawn):
    x, sizes, seen, cut = drawn
    left, fate = MCTF().reduce(Tokens(x, sizes), seen, cut)
    assume(fate.margin.min() > 1e-5)  # closer than this, fp32 may decide otherwise
    for i in range(x.shape[0]):
        received = slow_attention_of(seen, i).mean(dim=0)
        r = x.shape[1] - cut.leaving
        groups = slow_groups(seen.mean_key[i], received, sizes[i, :, 0], r, cut.prefix)
        found = [(fate.into[i] == out).nonzero().flatten().tolist() for out in range(cut.leaving)]
        assert found == groups
        slow, slow_size = slow_means(x[i], sizes[i, :, 0] * received, sizes[i, :, 0], groups)
        torch.testing.assert_close(left.x[i].double(), slow, rtol=0, atol=1e-4)
        torch.testing.assert_close(left.size[i, :, 0].double(), slow_size)


@given(cuts(most=lambda patches: patches // 2))
def test_properties_of_every_merge(drawn):
    x, sizes, seen, cut = drawn
    left, fate = MCTF().reduce(Tokens(x, sizes), seen, cut)
    front = torch.arange(cut.prefix).expand(x.shape[0], cut.prefix)
    assert left.x.shape == (x.shape[0], cut.leaving, x.shape[2])
    assert torch.equal(fate.into[:, : cut.prefix], front)
    torch.testing.assert_close(left.x[:, : cut.prefix], x[:, : cut.prefix])
    torch.testing.assert_close(left.size.sum(dim=1), sizes.sum(dim=1))
    by_fate = torch.zeros_like(left.size[..., 0]).scatter_add(1, fate.into, sizes[..., 0])
    assert torch.equal(by_fate, left.size[..., 0])
    assume(fate.margin.min() > 1e-5)
    for i in range(x.shape[0]):
        tokens = Tokens(x[i : i + 1], sizes[i : i + 1])
        _, alone = MCTF().reduce(tokens, one_image(seen, i), cut)
        assert torch.equal(alone.into[0], fate.into[i])


def test_a_hand_made_case_goes_both_ways():
    """Of 4 patches one goes from A to B, and the B that it did not join back to A."""
    seen = seen_at_random(torch.Generator().manual_seed(0), 1, 1, 5, 2)
    angles = torch.tensor([0.0, 0.0, 0.1, 1.5, 1.7])  # A: 0, 2, 4; B: 1, 3; the class token is 0
    seen.k[0, 0] = torch.stack([angles.cos(), angles.sin()], dim=1)
    seen.q.zero_()
    seen.bias.zero_()
    x = torch.arange(5.0).reshape(1, 5, 1)
    left, fate = MCTF().reduce(Tokens(x), seen, Cut(0, 1, 3, (2, 2), trace=True))
    assert fate.into.tolist() == [[0, 2, 2, 1, 1]]
    torch.testing.assert_close(left.x.flatten(), torch.tensor([0.0, 3.5, 1.5]))
    assert left.size.flatten().tolist() == [1, 2, 2]


@pytest.mark.parametrize("patches", range(2, 9))
def test_as_much_as_it_says_can_leave(patches):
    seen = seen_at_random(torch.Generator().manual_seed(patches), 1, 1, patches + 1, 2)
    leaving = 1 + MCTF().fewest(patches)
    x = torch.randn(1, patches + 1, 2, generator=torch.Generator().manual_seed(0))
    left, _ = MCTF().reduce(Tokens(x), seen, Cut(0, 1, leaving, (1, patches)))
    assert left.size.sum() == patches + 1
    assert left.x.isfinite().all()
