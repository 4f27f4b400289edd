"""Matching and merging: the golden cases, a slow reference in plain loops, properties."""

from contextlib import nullcontext

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from tests import oracle_case
from tests.tocom.slow_reference import slow_match, slow_merge
from tocom import RateError, ShapeError, match, merge, unmerge
from tocom.reduction import Fate

CASES = ["merge_class", "merge_class_distill", "merge_no_prefix", "merge_clipped", "merge_odd"]
TOLERANCE = {"rtol": 0, "atol": 1e-4}


# --- the golden cases


def golden(name):
    case, tensors = oracle_case.read(name)
    prefix = case["class_token"] + case["distill_token"]
    r = min(case["r"], (tensors["metric"].shape[1] - prefix) // 2)
    return tensors, match(tensors["metric"], r, prefix, margin=True)


@pytest.mark.parametrize("name", CASES)
def test_merge_agrees_with_the_reference(name):
    tensors, matched = golden(name)
    merged, size = merge(tensors["x"], tensors["size"], matched)
    torch.testing.assert_close(merged, tensors["merged"], **TOLERANCE)
    torch.testing.assert_close(size, tensors["merged_size"], **TOLERANCE)
    held = torch.nn.functional.one_hot(matched.assignment, size.shape[1]).transpose(1, 2)
    assert torch.equal(held.float(), tensors["source"])  # [B, M, N]
    assert matched.margin.min() > 1e-5  # as promised, no tie decides a golden case


@pytest.mark.parametrize("name", [name for name in CASES if name != "merge_class_distill"])
def test_unmerge_agrees_with_the_reference(name):
    tensors, matched = golden(name)
    restored = unmerge(tensors["merged"], matched)
    torch.testing.assert_close(restored, tensors["unmerged"], **TOLERANCE)


def test_unmerge_with_a_distillation_token_undoes_what_the_reference_leaves():
    # The reference moves the distillation token, the first of set B, to position 1 when it
    # merges, but its unmerge still takes the first U tokens for the unmerged of A and all
    # others for B. So there every A token after the class token gets its neighbour's value.
    # Ours gives each token its own group; given the tokens in the order that the reference
    # assumes, it finds the reference's values.
    tensors, matched = golden("merge_class_distill")
    merged = tensors["merged"]
    unmerged_of_a = merged.shape[1] - tensors["x"].shape[1] // 2
    order = [0, unmerged_of_a, *range(1, unmerged_of_a)]
    order += range(unmerged_of_a + 1, merged.shape[1])
    restored = unmerge(merged[:, order], matched)
    torch.testing.assert_close(restored, tensors["unmerged"], **TOLERANCE)

    ours = unmerge(merged, matched)
    theirs_by_source = tensors["source"].transpose(1, 2) @ merged  # each token's own group
    torch.testing.assert_close(ours, theirs_by_source, **TOLERANCE)
    assert torch.equal(ours[:, :2], merged[:, :2])


# --- a slow reference


@st.composite
def tokens(draw):
    """A metric [B, N, d], tokens [B, N, C], sizes [B, N, 1], r and prefix."""
    prefix = draw(st.integers(0, 6))
    count = prefix + draw(st.integers(2, 24))
    r = draw(st.integers(1, (count - prefix) // 2))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    batch = draw(st.integers(1, 3))
    metric = torch.randn(batch, count, 5, generator=generator)
    x = torch.randn(batch, count, 3, generator=generator)
    size = torch.randint(1, 9, (batch, count, 1), generator=generator).float()
    return metric, x, size, r, prefix


@given(tokens())
def test_the_fast_path_equals_plain_loops(drawn):
    metric, x, size, r, prefix = drawn
    matched = match(metric, r, prefix, margin=True)
    merged, merged_size = merge(x, size, matched)
    for i in range(metric.shape[0]):
        groups, margin = slow_match(metric[i].double().tolist(), r, prefix)
        assume(margin > 1e-5)  # closer than this, fp32 may decide otherwise
        slow, slow_size = slow_merge(x[i], size[i, :, 0], groups)
        torch.testing.assert_close(merged[i], slow, rtol=0, atol=1e-5)
        torch.testing.assert_close(merged_size[i, :, 0], slow_size)
        for out, group in enumerate(groups):
            assert (matched.assignment[i] == out).nonzero().flatten().tolist() == group
        assert matched.margin[i].item() == pytest.approx(margin, abs=1e-5)


# --- properties


@given(tokens())
def test_properties_of_every_merge(drawn):
    metric, x, size, r, prefix = drawn
    batch, count, _ = x.shape
    matched = match(metric, r, prefix)
    merged, merged_size = merge(x, size, matched)

    assert merged.shape == (batch, count - r, x.shape[2])
    torch.testing.assert_close(merged_size.sum(dim=1), size.sum(dim=1))
    # What the tokens stand for, together, stays.
    torch.testing.assert_close((merged * merged_size).sum(1), (x * size).sum(1), atol=1e-3, rtol=0)
    # Prefix tokens stay first, unmerged (times size over size may round).
    assert torch.equal(matched.assignment[:, :prefix], torch.arange(prefix).expand(batch, prefix))
    assert torch.equal(merged_size[:, :prefix], size[:, :prefix])
    torch.testing.assert_close(merged[:, :prefix], x[:, :prefix])
    # Every input token is kept or merged, once.
    whole = torch.cat([matched.kept, matched.merged], dim=1).sort(dim=1).values
    assert torch.equal(whole, torch.arange(count).expand(batch, count))
    # Sizes are those of the source map.
    by_source = torch.zeros_like(merged_size[..., 0]).scatter_add(
        1, matched.assignment, size[..., 0]
    )
    assert torch.equal(by_source, merged_size[..., 0])
    # Unmerged, each token has its group's value, and merging that again changes nothing.
    restored = unmerge(merged, matched)
    for i in range(batch):
        assert torch.equal(restored[i], merged[i, matched.assignment[i]])
    torch.testing.assert_close(merge(restored, size, matched)[0], merged)


@given(tokens())
def test_an_image_is_matched_alone_as_in_a_batch(drawn):
    metric, _, _, r, prefix = drawn
    together = match(metric, r, prefix, margin=True)
    assume(together.margin.min() > 1e-5)
    for i in range(metric.shape[0]):
        alone = match(metric[i : i + 1], r, prefix)
        assert torch.equal(alone.assignment[0], together.assignment[i])


@pytest.mark.parametrize("prefix", range(4))
@pytest.mark.parametrize("extra", range(2, 6))
def test_merging_all_that_may_merge_leaves_set_b(prefix, extra):
    metric = torch.randn(2, prefix + extra, 4, generator=torch.Generator().manual_seed(0))
    matched = match(metric, extra // 2, prefix)
    assert (matched.merged % 2 == 0).all()
    assert matched.kept.shape[1] == prefix + extra - extra // 2


def test_the_scale_of_the_metric_does_not_matter():
    metric = torch.randn(1, 20, 4, generator=torch.Generator().manual_seed(0))
    lengths = torch.logspace(-3, 3, 20)[None, :, None]
    assert torch.equal(match(metric, 5, 1).assignment, match(metric * lengths, 5, 1).assignment)


def test_a_source_map_follows_merge_upon_merge():
    x = torch.eye(12)[None]  # token i carries a mark of its own
    generator = torch.Generator().manual_seed(0)
    source, size, marks = torch.arange(12)[None], None, x
    for _ in range(3):
        matched = match(torch.randn(1, marks.shape[1], 4, generator=generator), 2, 1)
        marks, size = merge(marks, size, matched)
        source = Fate(matched.assignment).follow(source)
    for token in range(12):
        holders = marks[0, :, token].nonzero().flatten().tolist()
        assert holders == [source[0, token].item()]
    assert torch.equal(source[0].bincount(minlength=6).float(), size[0, :, 0])


def test_gradients_reach_the_tokens_in_proportion_to_their_size_and_not_the_metric():
    metric = torch.tensor([[[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.5, 1.0]]], requires_grad=True)
    x = torch.zeros(1, 4, 1, requires_grad=True)
    size = torch.tensor([3.0, 1.0, 1.0, 1.0]).reshape(1, 4, 1)
    matched = match(metric, 1, 0, margin=True)  # token 0 joins token 1
    merged, _ = merge(x, size, matched)
    merged[0, 1].backward()
    assert x.grad.flatten().tolist() == [0.75, 0.25, 0, 0]
    assert metric.grad is None
    assert not matched.margin.requires_grad


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def merged_and_gradient(metric, x, weights):
    x = x.clone().requires_grad_()
    merged, size = merge(x, None, match(metric, 24, 1))
    (merged * weights).sum().backward()
    return merged.detach(), size, x.grad


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_it_obeys_torchs_deterministic_algorithms(device, request):
    # On a GPU, sums over an index are otherwise taken in any order.
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("there is no GPU")
    generator = torch.Generator().manual_seed(0)
    shapes = (8, 50, 4), (8, 50, 96), (8, 26, 96)
    drawn = [torch.randn(shape, generator=generator).to(device) for shape in shapes]
    usual = merged_and_gradient(*drawn)
    request.getfixturevalue("deterministic")
    first, second = merged_and_gradient(*drawn), merged_and_gradient(*drawn)
    for by_default, one, other in zip(usual, first, second, strict=True):
        torch.testing.assert_close(one, by_default, rtol=0, atol=0 if device == "cpu" else 1e-5)
        assert torch.equal(one, other)


# --- precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
def test_matching_runs_in_fp32(dtype, autocast):
    # Two partners whose cosines differ by 1e-4: in bf16 and fp16 they would tie and the
    # first would win.
    angle = torch.tensor([0.0, 0.5002, 3.0, 0.5])
    metric = torch.stack([angle.cos(), angle.sin()], dim=-1)[None]
    context = torch.autocast("cpu", dtype=dtype) if autocast else nullcontext()
    with context:
        assert match(metric, 1, 0).assignment[0].tolist() == [2, 1, 0, 2]

    half = torch.randn(2, 64, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    with context:
        assert torch.equal(match(half, 20, 1).assignment, match(half.float(), 20, 1).assignment)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sizes", ["fp32", "half", None])
def test_a_half_precision_merge_rounds_once(dtype, sizes):
    generator = torch.Generator().manual_seed(0)
    metric = torch.randn(2, 64, 16, generator=generator)
    x = torch.randn(2, 64, 8, generator=generator).to(dtype)
    size = torch.randint(1, 250, (2, 64, 1), generator=generator).float() if sizes else None
    matched = match(metric, 30, 1)
    exact, exact_size = merge(x.float(), size, matched)
    merged, merged_size = merge(x, size.to(dtype) if sizes == "half" else size, matched)
    assert merged.dtype == dtype
    assert torch.equal(merged, exact.to(dtype))
    assert merged_size.dtype == torch.float32
    assert torch.equal(merged_size, exact_size)


def test_sizes_above_256_still_add_up_in_bf16():
    # bf16 has eight bits: 256 + 1 = 256. An image of 384 px has 577 tokens.
    x = torch.randn(1, 578, 4, generator=torch.Generator().manual_seed(0)).bfloat16()
    size = None
    while x.shape[1] > 2:
        matched = match(x, (x.shape[1] - 1) // 2, 1)
        x, size = merge(x, size, matched)
    assert size.flatten().tolist() == [1, 577]


# --- the margin


def test_hand_made_ties_have_no_margin():
    right, up, left = [1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]
    # Both B tokens are equally like the A token that merges.
    partners = torch.tensor([[right, up, left, up]])
    assert match(partners, 1, 0, margin=True).margin.tolist() == [0]
    # Both A tokens are equally like their partners, and one is to merge.
    pairs = torch.tensor([[right, right, up, up]])
    assert match(pairs, 1, 0, margin=True).margin.tolist() == [0]
    # Both merge: no decision is tied.
    assert match(pairs, 2, 0, margin=True).margin.tolist() == [1]


def test_the_margin_is_measured_per_image_and_only_when_asked_for():
    right, up = [1.0, 0.0], [0.0, 1.0]
    metric = torch.tensor([[right, up, right, right], [right, up, up, up]])
    # Token 0 of the first image is like 3 alone, by 1; in the second all is tied.
    assert match(metric, 2, 0, margin=True).margin.tolist() == [1, 0]
    assert match(metric, 2, 0).margin is None


def test_the_order_of_the_rest_is_a_decision_without_a_prefix_only():
    # Cosines of the A tokens 0.9, 0.2, 0.2 with their best partner, the only one near.
    best = torch.tensor([0.9, 0.2, 0.2])
    a = torch.stack([best, (1 - best**2).sqrt(), torch.zeros(3)], dim=-1)
    b = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0], [0.0, 0.0, 1.0]])
    bare = torch.stack([a, b], dim=1).flatten(0, 1)[None]
    assert match(bare, 1, 0, margin=True).margin.item() == pytest.approx(0, abs=1e-6)
    prefix = torch.tensor([[[0.3, 0.3, 0.3]] * 2])
    assert match(torch.cat([prefix, bare], dim=1), 1, 2, margin=True).margin.item() == (
        pytest.approx(0.7, abs=1e-6)
    )


def test_without_an_alternative_the_margin_is_the_widest():
    metric = torch.randn(1, 3, 4, generator=torch.Generator().manual_seed(0))
    assert match(metric, 1, 1, margin=True).margin.tolist() == [2]  # one A token, one B token
    assert match(metric, 0, 1, margin=True).margin.tolist() == [2]
    five = torch.randn(1, 5, 4, generator=torch.Generator().manual_seed(0))
    assert match(five, 1, 3, margin=True).margin.tolist() == [2]  # the other B is a prefix token


# --- errors


@pytest.mark.parametrize("r", [-1, 9])
def test_more_than_half_cannot_merge(r):
    message = rf"of 18 tokens with 2 prefix tokens at most 8 can merge at once, got {r}"
    with pytest.raises(RateError, match=message):
        match(torch.randn(1, 18, 4), r, 2)


def test_tensors_of_other_tokens_are_refused():
    matched = match(torch.randn(2, 9, 4), 3, 1)
    with pytest.raises(ShapeError, match=r"this match is of 9 tokens, got x \(2, 10, 4\)"):
        merge(torch.randn(2, 10, 4), None, matched)
    with pytest.raises(ShapeError, match=r"of 9 tokens, got x .* and size \(2, 10, 1\)"):
        merge(torch.randn(2, 9, 4), torch.ones(2, 10, 1), matched)
    with pytest.raises(ShapeError, match=r"size \(2, 9\)"):
        merge(torch.randn(2, 9, 4), torch.ones(2, 9), matched)
    with pytest.raises(ShapeError, match=r"this match leaves 6 tokens, got x \(2, 9, 4\)"):
        unmerge(torch.randn(2, 9, 4), matched)
