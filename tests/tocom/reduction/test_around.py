"""Merging around the MLP against a direct evaluation in float64."""

import copy

import pytest
import timm
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from tests.tocom.reduction.slow_methods import cuts
from tests.tocom.slow_reference import slow_attention, slow_match, slow_merge
from tests.tocom_models import KINDS, pictures, small_model
from tocom import Adapter, Ladder, LowRank, ReductionError, cost, forward_features, trace
from tocom.merging import spread
from tocom.reduction import AroundMLP, Tokens, ToMe

LADDER = Ladder("around", AroundMLP(), ((0, 0, 0), (3, 0, 7), (8, 8, 8)), patches=16)


def adapter(model):
    generator = torch.Generator().manual_seed(0)
    width = model.embed_dim
    pairs = (
        (
            torch.randn(4, width, generator=generator),
            torch.randn(width, 4, generator=generator),
        )
        for _ in model.blocks
    )
    return Adapter([LowRank(0.1 * down, 0.1 * up) for down, up in pairs])


def directly(model, image, removed, branches=None):
    """Return the final tokens of one image [3, H, W] in plain steps, and the least margin."""
    model = copy.deepcopy(model).double()
    x = model.norm_pre(model._pos_embed(model.patch_embed(image[None].double())))[0]
    margin = 2.0
    for i, (block, r) in enumerate(zip(model.blocks, removed, strict=True)):
        attention, heads, width = block.attn, block.attn.num_heads, x.shape[1]
        q, k, v = (
            part.reshape(-1, heads, width // heads).transpose(0, 1)
            for part in attention.qkv(block.norm1(x)).chunk(3, dim=1)
        )
        q, k = attention.q_norm(q), attention.k_norm(k)
        y = slow_attention(q, k, v, None)
        x = x + block.ls1(attention.proj(y.transpose(0, 1).reshape(-1, width)))
        groups = [[token] for token in range(len(x))]
        if r:
            groups, gap = slow_match(k.mean(dim=0).tolist(), r, model.num_prefix_tokens)
            margin = min(margin, gap)
        merged, _ = slow_merge(x, x.new_ones(len(x)), groups)
        y = block.ls2(block.mlp(block.norm2(merged)))
        if branches is not None:
            down, up = branches.branches[i]
            y = y + (merged @ down.double().T).relu() @ up.double().T
        x = x.clone()
        for out, group in enumerate(groups):
            for token in group:
                x[token] = x[token] + y[out]
    return model.norm(x), margin


@pytest.mark.parametrize(
    ("kind", "tuned"), [*((kind, False) for kind in KINDS), ("deit3_small", True)]
)
def test_it_is_what_a_direct_evaluation_in_float64_gives(kind, tuned):
    model = small_model(kind)
    images = pictures(model, batch=1)
    branches = adapter(model) if tuned else None
    for rung in (1, 2):
        found = forward_features(model, images, rung, ladder=LADDER, adapter=branches)
        for i, image in enumerate(images):
            expected, margin = directly(model, image, LADDER.rungs[rung], branches)
            assert margin > 1e-5  # closer than this, fp32 may decide otherwise
            torch.testing.assert_close(found[i].double(), expected, rtol=0, atol=2e-4)


@given(cuts(most=lambda patches: patches // 2), st.sampled_from([0.0, 0.1]))
def test_every_place_gets_back_what_its_group_got(drawn, importance):
    x, _, seen, cut = drawn
    left, fate = AroundMLP(importance).reduce(Tokens(x), seen, cut)
    assume(fate.margin.min() > 1e-5)
    back = spread(left.x, fate.into)
    assert back.shape == x.shape
    torch.testing.assert_close(back[:, : cut.prefix], x[:, : cut.prefix])
    # Nothing is lost or made: each group has the mean of its tokens.
    torch.testing.assert_close(back.sum(dim=1), x.sum(dim=1), rtol=1e-4, atol=1e-4)
    merging, once = ToMe(importance).reduce(Tokens(x), seen, cut)
    assert torch.equal(left.x, merging.x)
    assert torch.equal(fate.into, once.into)


def test_no_token_leaves_a_block():
    model = small_model("dinov2_registers")
    traced = trace(model, pictures(model), 2, ladder=LADDER)
    tokens = traced.plan.tokens_in
    assert traced.plan.tokens == (tokens,) * 3
    assert traced.plan.reduced == (tokens - 8,) * 3
    assert torch.equal(traced.source, torch.arange(tokens).expand(3, -1))
    assert (traced.margin < 2).all()


def test_the_usual_schedule_of_its_paper():
    method = AroundMLP()
    assert [method.amounts(rung / method.steps, 2, 1024) for rung in (0, 1, 8, 16)] == [
        (32 * rung,) * 2 for rung in (0, 1, 8, 16)
    ]


def test_it_costs_what_the_paper_says():
    """DeiT-B at 512 pixels. The paper's figures are shares of another count."""
    with torch.device("meta"):
        model = timm.create_model("deit_base_patch16_384", img_size=512, num_classes=0)
    rungs = tuple((32 * rung,) * 12 for rung in range(17))
    ladder = Ladder("paper", AroundMLP(), rungs, patches=1024)
    whole = cost(model).macs
    shares = [cost(model, rung, ladder=ladder).macs / whole for rung in (8, 12, 16)]
    assert shares == pytest.approx([91.8 / 106.2, 84.5 / 106.2, 77.3 / 106.2], abs=0.01)


def test_options_are_checked():
    with pytest.raises(ReductionError, match="'importance' of the method 'around-mlp' must be"):
        AroundMLP(importance=-1)
    with pytest.raises(ReductionError, match="'metric' of the method 'around-mlp' must be one of"):
        AroundMLP(metric="values")
    with pytest.raises(ReductionError, match="'weight' of the method 'around-mlp' must be one of"):
        AroundMLP(weight="mean")
