"""Top-K and EViT: the golden cases, slow references in plain loops, forwards."""

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from tests import oracle_case
from tests.tocom_models import pictures, small_model
from tocom import Ladder, cost, forward, trace
from tocom.reduction import Cut, EViT, Seen, Tokens, TopK
from tocom.reduction.attentive import fuse, take
from tocom.reduction.ranking import highest

TOLERANCE = {"rtol": 0, "atol": 1e-4}


# --- the golden cases


def test_golden_top_k():
    for name in ("topk_1", "topk_2"):
        case, tensors = oracle_case.read(f"reduction/{name}")
        kept = highest(tensors["cls_attn"].mean(dim=1), case["K"])
        assert torch.equal(kept, tensors["idx"])
        assert torch.equal(take(tensors["x_mid"][:, 1:], kept), tensors["x_sel"][:, 1:])


def test_golden_evit():
    for name in ("evit_1", "evit_2"):
        case, tensors = oracle_case.read(f"reduction/{name}")
        attention, x = tensors["cls_attn"].mean(dim=1), tensors["x_mid"][:, 1:]
        kept = highest(attention, case["K"])
        assert torch.equal(kept, tensors["idx"][:, :-1])  # the last is the fused token
        fused = fuse(x, attention, kept)
        selected = torch.cat([take(x, kept), fused], dim=1)
        torch.testing.assert_close(selected, tensors["x_sel"][:, 1:], **TOLERANCE)


@pytest.mark.parametrize("name", ["topk_1", "topk_2", "evit_1", "evit_2"])
def test_golden_blocks(name):
    method = TopK() if name.startswith("topk") else EViT()
    case, tensors = oracle_case.read(f"reduction/{name}")
    state = oracle_case.run_block(case, tensors, method, case["K"])
    torch.testing.assert_close(state.x, tensors["x_out"], **TOLERANCE)
    positions = torch.arange(tensors["x"].shape[1])
    for source, kept in zip(state.source, tensors["idx"].tolist(), strict=True):
        held = {out: positions[source == 1 + out].tolist() for out in range(len(kept))}
        fused = set(positions[1:].tolist()) - {1 + i for i in kept}
        expected = {out: [1 + i] for out, i in enumerate(kept)}
        if method == EViT():
            expected[len(kept) - 1] = sorted(fused)
            assert not (source < 0).any()
        assert held == expected


# --- slow references


def slow(x, attention, prefix, keep):
    """Return the tokens that stay, the sum of the others and the margin, of one image."""
    patches = range(prefix, len(x))
    ranked = sorted(patches, key=lambda i: -attention[i])  # sorted keeps the order of equals
    stay = [*range(prefix), *ranked[:keep]]
    fused = sum((x[i] * attention[i] for i in ranked[keep:]), torch.zeros_like(x[0]))
    return stay, fused, attention[ranked[keep - 1]] - attention[ranked[keep]]


@st.composite
def tokens(draw):
    """Tokens [B, N, C], what attention saw of them, the prefix and how many patches to keep."""
    prefix = draw(st.integers(1, 5))
    patches = draw(st.integers(3, 20))
    batch, heads, width = draw(st.integers(1, 3)), draw(st.integers(1, 3)), 4
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    shape = (batch, heads, prefix + patches, width)
    q, k, v = (torch.randn(shape, generator=generator) for _ in range(3))
    x = torch.randn(batch, prefix + patches, 6, generator=generator)
    return Tokens(x), Seen(q, k, v, None, 0.5), prefix, draw(st.integers(1, patches - 2))


@given(tokens())
def test_the_fast_paths_equal_plain_loops(drawn):
    given_tokens, seen, prefix, keep = drawn
    x = given_tokens.x
    count = x.shape[1]
    left, fate = TopK().reduce(given_tokens, seen, Cut(0, prefix, prefix + keep, (1, 1), True))
    both, fates = EViT().reduce(given_tokens, seen, Cut(0, prefix, prefix + keep + 1, (1, 1), True))
    for i in range(x.shape[0]):
        attention = torch.stack(
            [(seen.q[i, h, 0] @ seen.k[i, h].T * 0.5).softmax(dim=0) for h in range(len(seen.q[i]))]
        ).mean(dim=0)
        stay, fused, margin = slow(x[i], attention, prefix, keep)
        assume(margin > 1e-6)
        assert torch.equal(left.x[i], x[i][stay])
        assert torch.equal(both.x[i, :-1], x[i][stay])
        torch.testing.assert_close(both.x[i, -1], fused, rtol=0, atol=1e-5)
        out = {token: place for place, token in enumerate(stay)}
        assert fate.into[i].tolist() == [out.get(token, -1) for token in range(count)]
        assert fates.into[i].tolist() == [out.get(token, len(stay)) for token in range(count)]
        assert fate.margin[i].item() == pytest.approx(margin.item(), abs=1e-6)
        assert torch.equal(fates.margin, fate.margin)


def test_of_equal_attention_the_first_stay():
    assert highest(torch.tensor([[1.0, 2, 1, 2, 1]]), 3).tolist() == [[1, 3, 0]]


def test_the_sum_is_as_exact_in_half_precision():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 50, 8, generator=generator).bfloat16()
    attention = torch.rand(2, 50, generator=generator).softmax(dim=1)
    kept = highest(attention, 10)
    exact = fuse(x.float(), attention, kept)
    assert torch.equal(fuse(x, attention, kept), exact.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fuse(x, attention, kept), exact.bfloat16())


def test_attention_is_in_fp32_under_autocast():
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 2, 3, 9, 4, generator=generator)
    exact = Seen(q, k, v, None, 0.5)
    with torch.autocast("cpu", torch.bfloat16):
        seen = Seen(q, k, v, None, 0.5)
        assert torch.equal(seen.class_attention, exact.class_attention)
        assert torch.equal(seen.received, exact.received)


# --- forwards


def test_the_fused_token_is_counted_and_later_a_token_like_others():
    ladder = Ladder("small", EViT(), ((0, 0, 0), (9, 5, 0), (9, 2, 2)), 16)
    model = small_model("dinov2_registers")
    assert ladder.plan(1, 3, 21, 5).tokens == (15, 11, 11)
    images = pictures(model, batch=8)
    first = trace(model, images, 1, ladder=ladder)
    last = first.source == 10
    assert (last.sum(dim=1) >= 5).all()
    assert (first.source >= 0).all()  # nothing is dropped
    # K = 2, and 3 tokens are left: there is nothing to save in the last block.
    assert ladder.plan(2, 3, 21, 5).acts == (True, True, False)


@pytest.mark.parametrize("amount", [15, 16, 99])
def test_one_token_is_not_fused_by_itself(amount):
    ladder = Ladder("small", EViT(), ((0, 0, 0), (amount, 0, 0)), 16)
    model = small_model()
    images = pictures(model)
    assert torch.equal(forward(model, images, 1, ladder=ladder), model(images))
    assert cost(model, 1, ladder=ladder).macs == cost(model, 0, ladder=ladder).macs


def test_more_than_there_is_to_keep_is_all():
    ladder = Ladder("small", TopK(), ((0, 0, 0), (16, 17, 99)), 16)
    model = small_model()
    images = pictures(model)
    assert torch.equal(forward(model, images, 1, ladder=ladder), model(images))


@pytest.mark.parametrize("method", [TopK(), EViT()])
def test_of_a_method_that_does_not_count_each_token_that_is_left_has_size_1(method):
    ladder = Ladder("small", method, ((0, 0, 0), (9, 0, 4)), 16)
    traced = trace(small_model(), pictures(small_model()), 1, ladder=ladder)
    assert traced.size.shape == (3, traced.plan.tokens[-1], 1)
    assert (traced.size == 1).all()
