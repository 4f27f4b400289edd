"""Adaptive Token Sampling: the golden cases, slow references in plain loops, padding."""

import copy

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from tests import oracle_case
from tests.tocom_models import pictures, small_model
from tocom import Ladder, ReductionError, cost, forward, forward_features, trace
from tocom.reduction import ATS, Chosen, method_of
from tocom.reduction.ats import VARIANTS, sample, significance

TOLERANCE = {"rtol": 0, "atol": 1e-4}
NAMES = ["ats_1", "ats_2", "ats_3"]


# --- the golden cases; there the class token is the first that is chosen, and the padding


def same_choice(chosen, ids, mask):
    """Whether the golden ids and mask are what was chosen; ours may have more padding."""
    width = mask.shape[1] - 1
    rows = (1 + chosen.rows).masked_fill(~chosen.live, 0)
    assert torch.equal(rows[:, :width], ids[:, 1:])
    assert torch.equal(chosen.live[:, :width], mask[:, 1:].bool())
    assert not chosen.live[:, width:].any()


def answered(attention, v, chosen):
    """The rows of attention that are answered, heads side by side: [B, 1 + K, H d]."""
    rows = torch.nn.functional.pad(1 + chosen.rows, (1, 0))
    every = (attention @ v).transpose(1, 2).flatten(2)
    return every.gather(1, rows.unsqueeze(-1).expand(-1, -1, every.shape[2]))


def same_where(mask, ours, theirs):
    """Whether two are the same where the mask says so; ours may have more padding."""
    mask = mask.bool()
    ours = ours[:, : mask.shape[1]]
    torch.testing.assert_close(ours[mask], theirs[mask].float(), **TOLERANCE)


@pytest.mark.parametrize(("variant", "key"), [("paper", "paper"), ("tokenreduction", "ref")])
@pytest.mark.parametrize("name", NAMES)
def test_golden_samples(name, variant, key):
    case, tensors = oracle_case.read(f"reduction/{name}")
    attention, v, live = tensors["attn"], tensors["v"], tensors["mask"]
    score = significance(attention[:, :, 0, 1:], v[:, :, 1:], variant)
    torch.testing.assert_close(score, tensors[f"score_{key}"].float(), **TOLERANCE)
    chosen = sample(score, case["K"], variant, live[:, 1:])
    same_choice(chosen, tensors[f"ids_{key}"], tensors[f"mask_{key}"])
    same_where(tensors[f"mask_{key}"], answered(attention, v, chosen), tensors[f"out_{key}"])


@pytest.mark.parametrize("name", ["atsofficial_1", "atsofficial_2"])
def test_golden_samples_of_the_official_code(name):
    case, tensors = oracle_case.read(f"reduction/{name}")
    attention, live = tensors["attn"], tensors["policy"] > 0
    v = tensors["v"] * live.unsqueeze(1)
    score = significance(attention[:, :, 0, 1:], v[:, :, 1:], "official")
    torch.testing.assert_close(score, tensors["score"], **TOLERANCE)
    chosen = sample(score, case["n_ref_tokens"] - 1, "official", live[:, 1:, 0])
    same_choice(chosen, tensors["ids"], tensors["mask"])
    same_where(tensors["mask"], answered(attention, v, chosen), tensors["attn_out"])


def test_a_golden_block():
    case, tensors = oracle_case.read("reduction/atsblock_1")
    state = oracle_case.run_block(case, tensors, ATS("tokenreduction"), case["K"])
    assert state.x.shape[1] == case["K"] + 1
    same_where(tensors["mask"], state.x, tensors["x_out"])
    live = state.size.squeeze(-1).bool()
    assert torch.equal(live[:, : case["K"]], tensors["mask"].bool())
    for source, ids, mask in zip(state.source, tensors["ids"], tensors["mask"], strict=True):
        kept = ids[mask.bool()]
        assert (source >= 0).nonzero().flatten().tolist() == sorted(kept.tolist())
        assert source[kept].tolist() == list(range(len(kept)))


# --- slow references, one image each, in float64


def slow_significance(attention, norms, variant):
    """Of attention [H, P] and norms of values [H, P], as lists."""
    heads, tokens = range(len(attention)), range(len(attention[0]))
    if variant == "official":
        both = [sum(norms[h][j] ** 2 for h in heads) ** 0.5 for j in tokens]
        score = [sum(attention[h][j] for h in heads) * both[j] for j in tokens]
        return [each / sum(score) for each in score]
    read = [[attention[h][j] * norms[h][j] for j in tokens] for h in heads]
    if variant == "tokenreduction":
        score = [sum(read[h][j] for h in heads) for j in tokens]
        return [each / (sum(score) + 1e-6) for each in score]
    return [sum(read[h][j] / sum(read[h]) for h in heads) / len(heads) for j in tokens]


def slow_sample(score, count, variant):
    """Return the tokens that stay, of the live tokens' scores."""
    order = list(range(len(score)))
    if variant == "official":
        order.sort(key=lambda j: score[j])
    total, sums = 0.0, []
    for j in order:
        total += score[j]
        sums.append(total)
    points = [(i + 0.5) / count for i in range(count)]
    if variant == "tokenreduction" and count > 1:
        points = torch.arange(1 / (2 * count), (2 * count - 1) / (2 * count), 1 / count).tolist()
    if variant == "official":
        sums = [(each - sums[0]) / (sums[-1] - sums[0]) for each in sums]
        least = min(each for each in sums if each > 0)
        points = [least + (1 - least) * i / max(1, count - 1) for i in range(count)]
    picked = {min(range(len(sums)), key=lambda i: abs(sums[i] - point)) for point in points}
    return [order[i] for i in sorted(picked)]


@st.composite
def looks(draw):
    """Attention [B, H, P] that is nearly all of few tokens or even, values, K and a variant."""
    batch, heads = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    tokens = draw(st.integers(2, 24))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    sharpness = draw(st.sampled_from([0.1, 1, 3]))
    logits = torch.randn(batch, heads, tokens, generator=generator) * sharpness
    v = torch.randn(batch, heads, tokens, 4, generator=generator)
    count = draw(st.integers(1, tokens))
    return logits.softmax(dim=-1) * 0.9, v, count, draw(st.sampled_from(VARIANTS))


@given(looks())
def test_the_fast_path_equals_plain_loops(drawn):
    attention, v, count, variant = drawn
    score = significance(attention, v, variant)
    chosen = sample(score, count, variant, margin=True)
    assert chosen.rows.shape == chosen.live.shape == (len(score), count)
    assume(chosen.margin.min() > 1e-5)  # closer than this, fp32 may decide otherwise
    for i in range(len(score)):
        norms = v[i].double().norm(dim=-1).tolist()
        slow = slow_significance(attention[i].double().tolist(), norms, variant)
        torch.testing.assert_close(score[i].tolist(), slow, rtol=0, atol=1e-5)
        assert chosen.rows[i][chosen.live[i]].tolist() == slow_sample(slow, count, variant)


@given(looks(), st.integers(1, 9))
def test_padding_is_not_picked_and_changes_nothing(drawn, padding):
    attention, v, count, variant = drawn
    assume(variant != "official")  # there the least significant token stays if there is padding
    score = significance(attention, v, variant)
    padded = torch.nn.functional.pad(score, (0, padding))
    live = torch.arange(padded.shape[1]).expand_as(padded) < score.shape[1]
    alone, beside = sample(score, count, variant), sample(padded, count, variant, live)
    assert torch.equal(alone.rows, beside.rows)
    assert torch.equal(alone.live, beside.live)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("tokens", [1, 2, 5])
def test_something_is_left_even_if_the_class_token_reads_nothing(tokens, variant):
    nothing = torch.zeros(2, 3, tokens)
    score = significance(nothing, torch.ones(2, 3, tokens, 4), variant)
    for count in range(1, tokens + 1):
        chosen = sample(score, count, variant, margin=True)
        assert chosen.live[:, 0].all()
        assert chosen.rows.max() < tokens
        assert chosen.margin.isfinite().all()


def test_of_two_as_near_it_is_the_first():
    # Each point but the first is half-way between two tokens.
    chosen = sample(torch.full((1, 8), 1 / 8), 8)
    assert chosen.rows[chosen.live].tolist() == [0, 1, 2, 3, 4, 5, 6]


def test_one_token_that_has_nearly_all_leaves_few():
    score = torch.full((1, 8), 0.01)
    score[0, 2] = 0.93
    chosen = sample(score, 8)
    assert chosen.rows[chosen.live].tolist() == [1, 2]


def test_an_unknown_variant_is_refused():
    with pytest.raises(ReductionError, match="one of paper, tokenreduction, official, got 'x'"):
        ATS("x")
    assert method_of("ats", {"variant": "official"}) == ATS("official")


# --- forwards


def slow_forward(model, image, amounts):
    """Logits of an image [3, H, W] and how many tokens leave each block: only what stays runs."""
    model = copy.deepcopy(model).double()
    x = model.norm_pre(model._pos_embed(model.patch_embed(image[None].double())))[0]
    prefix, left = model.num_prefix_tokens, []
    for block, amount in zip(model.blocks, amounts, strict=True):
        attention = block.attn
        qkv = attention.qkv(block.norm1(x)).reshape(len(x), 3, attention.num_heads, -1)
        q, k, v = qkv.permute(1, 2, 0, 3)
        q, k = attention.q_norm(q), attention.k_norm(k)
        weights = (q @ k.transpose(1, 2) * attention.scale).softmax(dim=-1)
        if amount:
            read, norms = weights[:, 0, prefix:].tolist(), v[:, prefix:].norm(dim=-1).tolist()
            score = slow_significance(read, norms, "paper")
            stay = slow_sample(score, min(amount, len(score)), "paper")
            rows = [*range(prefix), *(prefix + j for j in stay)]
            x, weights = x[rows], weights[:, rows]
        y = (weights @ v).transpose(0, 1).flatten(1)
        x = x + block.ls1(attention.proj(y))
        x = x + block.ls2(block.mlp(block.norm2(x)))
        left.append(len(x))
    return model.forward_head(model.norm(x)[None])[0], left


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(
    "kind", ["vit_tiny", "dinov2_registers", "deit_tiny_distilled", "global_pool", "qk_norm"]
)
def test_padding_takes_no_part_in_an_answer(kind, fused):
    model = small_model(kind)
    for block in model.blocks:
        block.attn.fused_attn = fused
    ladder = Ladder("small", ATS(), ((0, 0, 0), (14, 0, 12)), 16)
    images = pictures(model, batch=4)
    traced = trace(model, images, 1, ladder=ladder)
    assert traced.margin.min() > 1e-5
    live = []
    for i in range(4):
        logits, left = slow_forward(model, images[i], (14, 0, 12))
        torch.testing.assert_close(traced.logits[i], logits.float(), rtol=0, atol=1e-4)
        assert traced.size[i].sum() == left[-1]
        live.append(left[-1])
    assert min(live) < traced.plan.tokens[-1]  # there is padding
    features = forward_features(model, images, 1, ladder=ladder)
    assert features.shape[1] == traced.plan.tokens[-1]


@pytest.mark.parametrize("variant", VARIANTS)
def test_one_point_leaves_one_token(variant):
    model = small_model("global_pool")
    ladder = Ladder("small", ATS(variant), ((0, 0, 0), (1, 1, 1)), 16)
    traced = trace(model, pictures(model), 1, ladder=ladder)
    assert traced.logits.isfinite().all()
    assert traced.size.flatten(1).tolist() == [[1, 1]] * 3


@pytest.mark.parametrize("variant", VARIANTS)
def test_as_many_points_as_tokens_still_sample(variant):
    model = small_model()
    ladder = Ladder("small", ATS(variant), ((0, 0, 0), (16, 99, 16)), 16)
    images = pictures(model)
    assert ladder.plan(1, 3, 17, 1).tokens == (17, 17, 17)
    assert ladder.plan(1, 3, 17, 1).acts == (True, True, True)
    traced = trace(model, images, 1, ladder=ladder)
    assert (traced.size.sum(dim=1) < 17).all()
    assert cost(model, 1, ladder=ladder).macs > cost(model, 0, ladder=ladder).macs


def test_an_empty_batch_is_an_empty_answer():
    ladder = Ladder("small", ATS(), ((0, 0, 0), (9, 4, 4)), 16)
    assert forward(small_model(), torch.zeros(0, 3, 64, 64), 1, ladder=ladder).shape == (0, 10)


def test_torch_compiles_it_as_one_graph():
    model = small_model()
    images = pictures(model)
    ladder = Ladder("small", ATS(), ((0, 0, 0), (9, 4, 4)), 16)
    compiled = torch.compile(forward, fullgraph=True, backend="eager")
    assert torch.equal(
        compiled(model, images, 1, ladder=ladder), forward(model, images, 1, ladder=ladder)
    )


def test_the_fate_of_the_chosen():
    rows = torch.tensor([[0, 2, 3, 0], [0, 1, 3, 4]])
    live = torch.tensor([[True, True, True, False], [True] * 4])
    assert Chosen(rows, live).fate(5).into.tolist() == [[0, -1, 1, 2, -1], [0, 1, -1, 2, 3]]
