"""DiffRate: against plain loops, properties, its cost, and what it refuses."""

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from tests.tocom.reduction.slow_methods import (
    counted,
    cuts,
    of_all_blocks,
    one_image,
    slow_attention_of,
    slow_means,
)
from tests.tocom_models import pictures, small_model
from tocom import ReductionError, cost, forward, trace
from tocom.reduction import DiffRate, Tokens, method_of

SHARES = st.sampled_from([0.0, 0.25, 0.5, 1.0])


def slow_groups(keys, attention, leaving, dropped, prefix):
    """Return which tokens each output token of one image holds."""
    rows = [row / row.norm() for row in keys.double()]
    ranked = sorted(range(prefix, len(rows)), key=lambda i: float(attention[i]), reverse=True)
    staying = sorted(ranked[: leaving - prefix])
    merging = ranked[leaving - prefix : len(rows) - prefix - dropped]
    into = {i: max(staying, key=lambda j: float(rows[i] @ rows[j])) for i in merging}
    return [
        sorted([out] + [i for i in merging if into[i] == out]) for out in [*range(prefix), *staying]
    ]


@given(cuts(most=lambda patches: patches - 1), SHARES)
def test_it_is_what_plain_loops_say(drawn, pruned):
    x, sizes, seen, cut = drawn
    left, fate = DiffRate(pruned).reduce(Tokens(x, sizes), seen, cut)
    assume(fate.margin.min() > 1e-5)  # closer than this, fp32 may decide otherwise
    dropped = int(pruned * (x.shape[1] - cut.leaving) + 0.5)
    assert ((fate.into == -1).sum(dim=1) == dropped).all()
    for i in range(x.shape[0]):
        attention = slow_attention_of(seen, i)[0]
        groups = slow_groups(seen.mean_key[i], attention, cut.leaving, dropped, cut.prefix)
        found = [(fate.into[i] == out).nonzero().flatten().tolist() for out in range(cut.leaving)]
        assert found == groups
        slow, slow_size = slow_means(x[i], sizes[i, :, 0], sizes[i, :, 0], groups)
        torch.testing.assert_close(left.x[i].double(), slow, rtol=0, atol=1e-4)
        torch.testing.assert_close(left.size[i, :, 0].double(), slow_size)


@given(cuts(most=lambda patches: patches - 1), SHARES)
def test_properties_of_every_cut(drawn, pruned):
    x, sizes, seen, cut = drawn
    left, fate = DiffRate(pruned).reduce(Tokens(x, sizes), seen, cut)
    front = torch.arange(cut.prefix).expand(x.shape[0], cut.prefix)
    assert left.x.shape == (x.shape[0], cut.leaving, x.shape[2])
    assert torch.equal(fate.into[:, : cut.prefix], front)
    torch.testing.assert_close(left.x[:, : cut.prefix], x[:, : cut.prefix])
    assert torch.equal(left.size[:, : cut.prefix], sizes[:, : cut.prefix])  # nothing joins these
    gone = (sizes[..., 0] * (fate.into == -1)).sum(dim=1)
    torch.testing.assert_close(left.size.sum(dim=(1, 2)) + gone, sizes.sum(dim=(1, 2)))
    assume(fate.margin.min() > 1e-5)
    for i in range(x.shape[0]):
        tokens = Tokens(x[i : i + 1], sizes[i : i + 1])
        _, alone = DiffRate(pruned).reduce(tokens, one_image(seen, i), cut)
        assert torch.equal(alone.into[0], fate.into[i])


@pytest.mark.parametrize("pruned", [0, 0.5, 1])
def test_it_costs_what_a_counted_run_does_and_is_stock_at_rung_0(pruned):
    model = small_model("deit_tiny_distilled")
    ladder = of_all_blocks(DiffRate(pruned), 4, model.patch_embed.num_patches)
    ladder.check(model)
    images = pictures(model)
    torch.testing.assert_close(forward(model, images, 0, ladder=ladder), model(images))
    traced = trace(model, images, 1, ladder=ladder)
    held = model.patch_embed.num_patches + model.num_prefix_tokens - (traced.source == -1).sum(1)
    assert torch.equal(traced.size.sum(dim=(1, 2)), held.float())
    assert cost(model, 1, ladder=ladder).macs == counted(model, ladder)


def test_one_patch_is_always_left():
    assert DiffRate().leaving(99, 16, (4, 4)) == 1


@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan"), True, "half"])
def test_a_share_that_is_none_is_refused(value):
    with pytest.raises(
        ReductionError,
        match="the option 'pruned' of the method 'diffrate' must be a number from 0 to 1, got",
    ):
        method_of("diffrate", {"pruned": value})


def test_a_model_without_a_class_token_is_refused():
    with pytest.raises(ReductionError, match="the method 'diffrate' reads the class token"):
        of_all_blocks(DiffRate(), 1, 16).check(small_model("no_prefix"))
