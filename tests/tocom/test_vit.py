"""The forward at a rate: parity with timm, the golden cases, a slow reference, properties."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import timm
import torch

import tocom
from tests import oracle_case
from tests.tocom.slow_reference import slow_forward
from tests.tocom_models import KINDS, SMALL, pictures, small_model
from tocom import RateError, Variant, forward, forward_features, plan, trace
from tocom.vit import embed, head, outputs, pool

MODELS = ["vit_class", "vit_deep", "vit_distilled", "vit_noprop"]
RATES = [0, 1, 3, 8, (3, -1.0), (3, 0.5), [4, 0, 1]]


def gated_mlp_model():
    """A small model with the gated MLP of the larger DINOv2 models."""
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_giant_patch14_dinov2", img_size=56, depth=2, embed_dim=48, num_heads=3, num_classes=5
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=parameter.mean().item(), std=0.1)
    return model.eval().requires_grad_(False)


# --- the golden cases


@pytest.mark.parametrize("name", MODELS)
def test_every_rate_agrees_with_the_reference(name):
    case, tensors = oracle_case.read(name)
    model, images = oracle_case.build(case, tensors), tensors["images"]
    for i, rate in enumerate(oracle_case.rates(case)):
        traced = trace(model, images, rate, proportional=case["prop_attn"])
        torch.testing.assert_close(traced.logits, tensors[f"r{i}.logits"], rtol=0, atol=1e-4)
        assert traced.plan.tokens == tuple(case["tokens"][f"r{i}"])
        assert traced.plan.asked == tuple(case["schedules"][f"r{i}"])
        if rate == 0:
            torch.testing.assert_close(traced.logits, tensors["stock_logits"], rtol=0, atol=1e-4)
            continue  # the reference has no sizes where nothing merges
        torch.testing.assert_close(traced.size, tensors[f"r{i}.size"], rtol=0, atol=1e-4)
        assert torch.equal(traced.source, tensors[f"r{i}.source"].long())


def test_proportional_attention_is_a_choice():
    case, tensors = oracle_case.read("vit_noprop")
    model, images = oracle_case.build(case, tensors), tensors["images"]
    with_bias = forward(model, images, case["rates"][-1])
    without = forward(model, images, case["rates"][-1], proportional=False)
    assert (with_bias - without).abs().max() > 1e-3


# --- parity with stock timm at rate 0


def fuse(model, fused):
    for block in model.blocks:
        block.attn.fused_attn = fused
    return model


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_rate_0_is_stock_timm_bit_for_bit(kind, fused):
    model = fuse(small_model(kind), fused)
    images = pictures(model)
    assert torch.equal(forward(model, images), model(images))
    assert torch.equal(forward_features(model, images), model.forward_features(images))
    for rate in ([], [0, 0], (0, 1.0)):
        assert torch.equal(forward(model, images, rate), model(images))


@pytest.mark.parametrize("kind", KINDS)
def test_returning_to_rate_0_is_bit_exact(kind):
    model = small_model(kind)
    images = pictures(model)
    before = forward(model, images)
    merged = forward(model, images, 4)
    assert torch.equal(forward(model, images), before)
    assert torch.equal(forward(model, images, 4), merged)
    assert (merged - before).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["vit_tiny", "deit_tiny_distilled", "deit3_small", "no_prefix"])
@pytest.mark.parametrize("size", [(64, 64), (96, 48), (128, 80)])
def test_dynamic_image_sizes_are_stock_timm_too(kind, size):
    architecture, arguments = KINDS[kind]
    torch.manual_seed(0)
    model = timm.create_model(architecture, **SMALL, **arguments, dynamic_img_size=True).eval()
    images = pictures(model, size=size)
    with torch.no_grad():
        assert torch.equal(forward(model, images), model(images))
        traced = trace(model, images, 2)
    tokens = size[0] * size[1] // 16**2 + model.num_prefix_tokens
    assert traced.plan.tokens_in == tokens
    assert traced.size.sum(dim=1).flatten().tolist() == [tokens] * 3


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("kind", ["vit_tiny", "deit3_small", "no_prefix"])
def test_training_is_stock_timm_under_the_same_seed(kind, fused):
    architecture, arguments = KINDS[kind]
    rates = ["drop_rate", "pos_drop_rate", "proj_drop_rate", "attn_drop_rate", "drop_path_rate"]
    torch.manual_seed(0)
    model = timm.create_model(
        architecture, **SMALL, **arguments, **dict.fromkeys(rates, 0.3), patch_drop_rate=0.25
    ).train()
    fuse(model, fused)
    images = pictures(model, batch=8)
    torch.manual_seed(7)
    expected = model(images)
    torch.manual_seed(7)
    assert torch.equal(forward(model, images), expected)
    assert not torch.equal(forward(model, images), expected)


def test_a_distilled_model_in_distilled_training_gives_both_answers():
    model = small_model("deit_tiny_distilled").train()
    model.set_distilled_training(True)
    images = pictures(model)
    for ours, stock in zip(forward(model, images), model(images), strict=True):
        assert torch.equal(ours, stock)


def test_a_gated_mlp_is_stock_timm_too():
    model = gated_mlp_model()
    images = pictures(model)
    assert torch.equal(forward(model, images), model(images))


def test_training_at_a_rate_reaches_every_weight():
    model = small_model("global_pool").train().requires_grad_(True)
    forward(model, pictures(model), 4).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        if name != "cls_token":  # one row of it is all there is
            assert parameter.grad.abs().max() > 0, name


# --- a slow reference


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("rate", "fused"), [(3, True), ([4, 0, 5], False), (99, True)])
def test_the_fast_path_equals_plain_loops(kind, rate, fused):
    model = fuse(small_model(kind), fused)
    images = pictures(model, batch=2)
    traced = trace(model, images, rate)
    assert traced.margin.min() > 1e-5  # closer than this, fp32 may decide otherwise
    for i in range(2):
        slow, size, source = slow_forward(model, images[i], traced.plan.removed)
        torch.testing.assert_close(traced.logits[i], slow.float(), rtol=0, atol=1e-4)
        assert traced.size[i].flatten().tolist() == size.tolist()
        assert traced.source[i].tolist() == source


def test_without_proportional_attention_it_equals_plain_loops_too():
    model = small_model("global_pool")
    images = pictures(model, batch=1)
    traced = trace(model, images, 3, proportional=False)
    slow, _, _ = slow_forward(model, images[0], traced.plan.removed, proportional=False)
    torch.testing.assert_close(traced.logits[0], slow.float(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("include_prefix", [True, False])
@pytest.mark.parametrize("fc_norm", [True, False])
def test_average_pooling_weighs_tokens_by_their_size(include_prefix, fc_norm):
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", **SMALL, global_pool="avg", reg_tokens=2, fc_norm=fc_norm,
        pool_include_prefix=include_prefix,
    ).eval().requires_grad_(False)  # fmt: skip
    images = pictures(model, batch=2)
    traced = trace(model, images, 4)
    for i in range(2):
        slow, _, _ = slow_forward(model, images[i], traced.plan.removed)
        torch.testing.assert_close(traced.logits[i], slow.float(), rtol=0, atol=1e-4)

    # A token of size three weighs as three tokens of size one in timm's own pooling.
    x = torch.randn(1, 3 + 5, model.embed_dim)
    size = torch.tensor([1.0, 1, 1, 3, 1, 2, 1, 1]).reshape(1, -1, 1)
    repeated = x.repeat_interleave(size.flatten().long(), dim=1)
    torch.testing.assert_close(head(model, x, size), model.forward_head(repeated))


def test_dropout_before_the_head_is_timms_own():
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", **SMALL, global_pool="avg", drop_rate=0.5
    ).train()
    x, ones = torch.randn(3, 17, model.embed_dim), torch.ones(3, 17, 1)
    torch.manual_seed(7)
    expected = model.forward_head(x)
    torch.manual_seed(7)
    torch.testing.assert_close(head(model, x, ones), expected)


# --- properties


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rate", RATES)
def test_the_trace_is_consistent(kind, rate):
    model = small_model(kind)
    images = pictures(model)
    traced = trace(model, images, rate)
    prefix = model.num_prefix_tokens
    tokens = model.patch_embed.num_patches + prefix
    assert traced.plan == plan(rate, len(model.blocks), tokens, prefix)

    left = traced.plan.tokens[-1]
    assert traced.size.shape == (3, left, 1)
    assert traced.size.sum(dim=1).flatten().tolist() == [tokens] * 3
    assert (traced.size[:, :prefix] == 1).all()
    assert torch.equal(traced.source[:, :prefix], torch.arange(prefix).expand(3, prefix))
    for i in range(3):
        held = traced.source[i].bincount(minlength=left)
        assert torch.equal(held, traced.size[i].flatten().long())
    assert torch.equal(forward(model, images, rate), traced.logits)  # tracing changes nothing
    assert traced.margin.shape == (3,)
    assert ((traced.margin >= 0) & (traced.margin <= 2)).all()


@pytest.mark.parametrize("kind", KINDS)
def test_features_are_what_the_head_reads(kind):
    model = small_model(kind)
    images = pictures(model)
    traced = trace(model, images, 4)
    tokens = forward_features(model, images, 4)
    assert tokens.shape == (3, traced.plan.tokens[-1], model.embed_dim)
    assert torch.equal(head(model, tokens, traced.size), traced.logits)
    assert torch.equal(pool(model, tokens, traced.size), traced.features)


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_alone_equals_it_in_a_batch(kind):
    model = small_model(kind)
    images = pictures(model, batch=5)
    traced = trace(model, images, 4)
    assert traced.margin.min() > 1e-5
    for i in range(5):
        own = trace(model, images[i : i + 1], 4)
        torch.testing.assert_close(own.logits[0], traced.logits[i], rtol=0, atol=1e-5)
        assert torch.equal(own.source[0], traced.source[i])
        torch.testing.assert_close(own.margin[0], traced.margin[i], rtol=0, atol=1e-5)


def test_identical_neighbours_merge_first_and_change_nothing():
    # Without position embedding equal patches are equal tokens, and a mean of equal tokens
    # that counts as many is the same as all of them.
    model = small_model("no_prefix")
    model.pos_embed.zero_()
    row = torch.randn(1, 3, 64, 32, generator=torch.Generator().manual_seed(0))
    patches = row.unfold(3, 16, 16).repeat_interleave(2, dim=3)  # each column of patches twice
    images = patches.permute(0, 1, 2, 3, 4).reshape(1, 3, 64, 64)
    traced = trace(model, images, [8])
    assert traced.size.flatten().tolist() == [2] * 8
    torch.testing.assert_close(traced.logits, model(images), rtol=0, atol=1e-5)


def test_the_margin_of_a_forward_is_its_smallest(monkeypatch):
    model = small_model("vit_tiny")
    images = pictures(model)
    margins = []

    def recording(*arguments, **options):
        matched = tocom.match(*arguments, **options)
        margins.append(matched.margin)
        return matched

    monkeypatch.setattr("tocom.reduction.tome.match", recording)
    traced = trace(model, images, [3, 0, 2])
    assert len(margins) == 2
    assert torch.equal(traced.margin, torch.stack(margins).amin(dim=0))
    assert len({int(row.argmin()) for row in torch.stack(margins).T}) == 2  # neither block always
    traced = trace(model, images, 0)
    assert traced.margin.tolist() == [2] * 3


def test_equal_patches_have_no_margin():
    model = small_model("vit_tiny")
    model.pos_embed.zero_()
    traced = trace(model, torch.ones(2, 3, 64, 64), 2)
    assert traced.margin.max() < 1e-6


def test_an_empty_batch_is_an_empty_answer():
    model = small_model("vit_tiny")
    traced = trace(model, torch.zeros(0, 3, 64, 64), 4)
    assert traced.logits.shape == (0, 10)
    assert traced.size.shape == (0, 5, 1)


@pytest.mark.parametrize(
    ("rate", "message"),
    [(-1, "must be 0 or more, got -1"), ([1] * 4, r"at most one entry a block \(3\), got 4")],
)
def test_a_malformed_rate_is_refused(rate, message):
    model = small_model("vit_tiny")
    with pytest.raises(RateError, match=message):
        forward(model, pictures(model), rate)
    with pytest.raises(RateError, match=message):
        forward_features(model, pictures(model), rate)


@pytest.mark.parametrize("kind", KINDS)
def test_the_head_reads_the_same_where_the_last_block_is_cut_short(kind):
    model = small_model(kind)
    images = pictures(model)
    for variant in (Variant(), Variant(3), Variant(3, proportional=False)):
        traced = trace(model, images, variant.rate, proportional=variant.proportional)
        answer = outputs(model, embed(model, images), variant)
        torch.testing.assert_close(answer.logits, traced.logits, rtol=0, atol=1e-5)
        torch.testing.assert_close(answer.features, traced.features, rtol=0, atol=1e-5)
        assert answer.states == ()


# One test, for one process: importing torch's compiler takes longer than all that it does here.
def test_torch_compiles_it_as_one_graph():
    for kind in ("vit_tiny", "global_pool"):
        model = small_model(kind)
        images = pictures(model)
        for rate in (0, 4):
            compiled = torch.compile(forward, fullgraph=True, dynamic=False, backend="eager")
            assert torch.equal(compiled(model, images, rate), forward(model, images, rate))


# --- a rate is an argument, not a state


def fingerprint(model):
    """Every attribute and every bit of the weights."""
    attributes = {name: sorted(vars(module)) for name, module in model.named_modules()}
    return attributes, {name: value.clone() for name, value in model.state_dict().items()}


def test_threads_at_mixed_rates_get_the_answers_of_each_alone():
    model = small_model("vit_tiny")
    images = pictures(model, batch=8)
    attributes, weights = fingerprint(model)
    alone = {}
    for i in range(8):
        for rate in range(5):
            traced = trace(model, images[i : i + 1], rate)
            assert traced.margin.item() > 1e-6
            alone[i, rate] = traced.logits
    work = list(alone) * 3

    def answer(key):
        i, rate = key
        return forward(model, images[i : i + 1], rate)

    with ThreadPoolExecutor(4) as threads:
        answers = list(threads.map(answer, work))
    for key, logits in zip(work, answers, strict=True):
        torch.testing.assert_close(logits, alone[key], rtol=0, atol=1e-5)

    after_attributes, after_weights = fingerprint(model)
    assert after_attributes == attributes
    assert all(torch.equal(after_weights[name], weights[name]) for name in weights)
    assert torch.equal(forward(model, images[:1]), alone[0, 0])


def test_inference_mode_and_frozen_weights_give_no_graph():
    model = small_model("vit_tiny")
    images = pictures(model)
    assert not forward(model, images, 4).requires_grad
    with torch.inference_mode():
        torch.testing.assert_close(forward(model, images, 4), forward(model, images, 4))
