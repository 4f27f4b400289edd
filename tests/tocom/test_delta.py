"""Deltas: the low-rank path, the folded path and weights changed by hand give one answer."""

import copy
import re

import pytest
import timm
import torch
from torch import nn
from torch.func import functional_call

from tests.tocom_models import KINDS, pictures, small_model
from tocom import (
    Delta,
    DeltaError,
    FoldedWeights,
    LowRank,
    check_delta,
    fold,
    forward,
    forward_features,
    trace,
)
from tocom.delta import TARGETS, linear, parts, target_layers

RANK = 3


def shapes(model, target):
    """Return (inputs, outputs) of a target, from the model's width alone."""
    width = model.embed_dim
    hidden = model.blocks[0].mlp.fc1.out_features
    return {"fc1": (width, hidden), "fc2": (hidden, width)}.get(target, (width, width))


def name_of(i, target):
    return f"blocks.{i}.{'mlp' if target.startswith('fc') else 'attn'}.{target}"


def drawn_delta(model, targets=tuple(TARGETS), dropout=0.0, scale=0.05):
    """A delta that changes `targets` in every block but the second."""
    generator = torch.Generator().manual_seed(2)
    pairs = {}
    for i in range(len(model.blocks)):
        if i == 1:
            continue
        for target in targets:
            inputs, outputs = shapes(model, target)
            down = scale * torch.randn(RANK, inputs, generator=generator)
            up = scale * torch.randn(outputs, RANK, generator=generator)
            pairs[name_of(i, target)] = LowRank(down, up)
    return Delta(pairs, dropout)


def changed_by_hand(model, delta):
    """The weights that the delta means, written without our code."""
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    width = model.embed_dim
    rows = {"q": slice(0, width), "k": slice(width, 2 * width), "v": slice(2 * width, 3 * width)}
    for name, pair in delta.pairs.items():
        room, _, target = name.rpartition(".")
        layer = f"{room}.qkv" if target in rows else name
        change = torch.zeros_like(weights[f"{layer}.weight"])
        change[rows.get(target, slice(None))] = pair.up @ pair.down
        weights[f"{layer}.weight"] = weights[f"{layer}.weight"] + change
    return weights


# --- one answer


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rate", [0, 4])
def test_low_rank_folded_and_changed_by_hand_agree(kind, rate):
    model = small_model(kind)
    images = pictures(model)
    delta = drawn_delta(model)
    by_hand = copy.deepcopy(model)
    by_hand.load_state_dict(changed_by_hand(model, delta))
    expected = forward(by_hand, images, rate)
    if rate == 0:
        assert torch.equal(expected, by_hand(images))
    for form in (delta, fold(model, delta)):
        traced = trace(model, images, rate, form)
        assert traced.margin.min() > 1e-5
        torch.testing.assert_close(traced.logits, expected, rtol=0, atol=1e-4)
        features = forward_features(model, images, rate, form)
        torch.testing.assert_close(
            features, forward_features(by_hand, images, rate), rtol=0, atol=1e-4
        )
    assert (forward(model, images, rate) - expected).abs().max() > 1e-2  # it does change much


@pytest.mark.parametrize("target", TARGETS)
def test_each_target_alone(target):
    model = small_model("vit_tiny")
    images = pictures(model)
    delta = drawn_delta(model, [target], scale=0.3)
    by_hand = copy.deepcopy(model)
    by_hand.load_state_dict(changed_by_hand(model, delta))
    expected = by_hand(images)
    torch.testing.assert_close(forward(model, images, 0, delta), expected, rtol=0, atol=1e-4)
    folded = fold(model, delta)
    torch.testing.assert_close(forward(model, images, 0, folded), expected, rtol=0, atol=1e-4)
    layer = TARGETS[target][0]
    assert set(folded.weights) == {f"blocks.0.{layer}", f"blocks.2.{layer}"}
    assert (expected - model(images)).abs().max() > 1e-2


@pytest.mark.parametrize(
    "arguments", [{"qkv_bias": False}, {"scale_attn_norm": True, "scale_mlp_norm": True}]
)
def test_layers_without_bias_and_with_norms_inside(arguments):
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, depth=2, num_classes=4, **arguments
    )
    model = model.eval().requires_grad_(False)
    delta = drawn_delta(model, scale=0.3)
    by_hand = copy.deepcopy(model)
    by_hand.load_state_dict(changed_by_hand(model, delta))
    images = pictures(model)
    for form in (delta, fold(model, delta)):
        torch.testing.assert_close(
            forward(model, images, 0, form), by_hand(images), rtol=0, atol=1e-4
        )


@pytest.mark.parametrize("delta", [Delta({}), FoldedWeights({})])
def test_an_empty_delta_changes_nothing(delta):
    model = small_model("vit_tiny")
    images = pictures(model)
    assert torch.equal(forward(model, images, 4, delta), forward(model, images, 4))


def test_the_model_is_left_as_it_is():
    model = small_model("vit_tiny")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    stock = forward(model, pictures(model), 4)
    delta = drawn_delta(model)
    pairs = {
        name: LowRank(pair.down.clone(), pair.up.clone()) for name, pair in delta.pairs.items()
    }
    for form in (delta, fold(model, delta)):
        forward(model, pictures(model), 4, form)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(forward(model, pictures(model), 4), stock)
    for name, pair in pairs.items():
        assert torch.equal(delta.pairs[name].down, pair.down)
        assert torch.equal(delta.pairs[name].up, pair.up)


def test_folded_weights_hold_only_what_changed_and_share_no_memory():
    model = small_model("vit_tiny")
    folded = fold(model, drawn_delta(model, ["q", "v"]))
    assert set(folded.weights) == {"blocks.0.attn.qkv", "blocks.2.attn.qkv"}
    weight = folded.weights["blocks.0.attn.qkv"]
    own = model.blocks[0].attn.qkv.weight
    width = model.embed_dim
    assert torch.equal(weight[width : 2 * width], own[width : 2 * width])  # k
    assert weight.data_ptr() != own.data_ptr()


def test_a_delta_can_be_moved_once():
    model = small_model("vit_tiny")
    delta = drawn_delta(model, dropout=0.25)
    moved = delta.to("meta", torch.float16)
    assert moved.dropout == 0.25
    assert moved.pairs.keys() == delta.pairs.keys()
    for pair in moved.pairs.values():
        assert {tensor.dtype for tensor in pair} == {torch.float16}
        assert {tensor.device.type for tensor in pair} == {"meta"}
    for name, pair in delta.to("cpu").pairs.items():
        assert all(a is b for a, b in zip(pair, delta.pairs[name], strict=True))


def test_folded_weights_can_be_moved():
    model = small_model("vit_tiny")
    folded = fold(model, drawn_delta(model))
    moved = folded.to("meta", torch.float16)
    assert moved.weights.keys() == folded.weights.keys()
    assert {weight.dtype for weight in moved.weights.values()} == {torch.float16}
    assert {weight.device.type for weight in moved.weights.values()} == {"meta"}
    for name, weight in folded.to("cpu").weights.items():
        assert weight is folded.weights[name]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_a_delta_on_the_cpu_runs_on_a_gpu():
    model = small_model("vit_tiny")
    images, delta = pictures(model), drawn_delta(model)
    expected = forward(model, images, 2, delta)
    for form in (delta, delta.to("cuda"), fold(model.cuda(), delta)):
        logits = forward(model.cuda(), images.cuda(), 2, form)
        torch.testing.assert_close(logits.cpu(), expected, rtol=0, atol=1e-3)


def test_folding_keeps_the_dtype_of_the_model():
    model = small_model("vit_tiny").bfloat16()
    delta = drawn_delta(model, scale=0.3)
    folded = fold(model, delta)
    assert {weight.dtype for weight in folded.weights.values()} == {torch.bfloat16}
    images = pictures(model).bfloat16()
    exact = forward(copy.deepcopy(model).float(), images.float(), 0, delta)
    logits = forward(model, images, 0, folded).float()
    assert (logits - exact).norm() < 0.05 * exact.norm()  # see the bound in test_vit.py


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_folding_rounds_once(dtype):
    model = small_model("vit_tiny").to(dtype)
    delta = drawn_delta(model, scale=0.3)
    exact = changed_by_hand(copy.deepcopy(model).float(), delta)
    for name, weight in fold(model, delta).weights.items():
        assert torch.equal(weight, exact[f"{name}.weight"].to(dtype))


# --- training


def test_gradients_are_those_of_the_weights_changed_by_hand():
    model = small_model("vit_tiny")
    images = pictures(model)
    plain = drawn_delta(model)
    leaves = {
        name: LowRank(pair.down.clone().requires_grad_(), pair.up.clone().requires_grad_())
        for name, pair in plain.pairs.items()
    }
    forward(model, images, 0, Delta(leaves)).square().sum().backward()

    hand = {
        name: LowRank(pair.down.clone().requires_grad_(), pair.up.clone().requires_grad_())
        for name, pair in plain.pairs.items()
    }
    weights = changed_by_hand(model, Delta(hand))
    functional_call(model, weights, images).square().sum().backward()
    for name, pair in leaves.items():
        for ours, theirs in zip(pair, hand[name], strict=True):
            assert ours.grad.abs().max() > 0, name
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-4)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_gradients_flow_while_tokens_merge():
    model = small_model("vit_tiny")
    delta = drawn_delta(model)
    leaves = [tensor.requires_grad_() for pair in delta.pairs.values() for tensor in pair]
    forward(model, pictures(model), 4, delta).square().sum().backward()
    assert all(leaf.grad.isfinite().all() and leaf.grad.abs().max() > 0 for leaf in leaves)


def test_the_reference_start_with_up_at_zero_trains_up_first():
    model = small_model("vit_tiny")
    pairs = {
        name: LowRank(pair.down.requires_grad_(), torch.zeros_like(pair.up).requires_grad_())
        for name, pair in drawn_delta(model, ["q", "v"]).pairs.items()
    }
    logits = forward(model, pictures(model), 4, Delta(pairs))
    torch.testing.assert_close(logits, forward(model, pictures(model), 4))
    logits.square().sum().backward()
    for pair in pairs.values():
        assert pair.up.grad.abs().max() > 0
        assert pair.down.grad.abs().max() == 0


@pytest.mark.parametrize("training", [True, False])
def test_dropout_is_the_deltas_whatever_mode_the_model_is_in(training):
    # A bank is distilled on a frozen backbone in evaluation mode.
    model = small_model("vit_tiny").train(training)
    images = pictures(model)
    sure = forward(model, images, 0, drawn_delta(model))
    assert torch.equal(forward(model, images, 0, drawn_delta(model)), sure)

    unsure = drawn_delta(model, dropout=0.5)
    torch.manual_seed(0)
    first = forward(model, images, 0, unsure)
    assert not torch.equal(first, sure)
    assert not torch.equal(forward(model, images, 0, unsure), first)
    torch.manual_seed(0)
    assert torch.equal(forward(model, images, 0, unsure), first)
    # Folded, as it is served, nothing is dropped.
    folded = forward(model, images, 0, fold(model, unsure))
    torch.testing.assert_close(folded, sure, rtol=0, atol=1e-4)


def test_dropout_keeps_the_mean_of_the_hidden_values():
    layer = torch.nn.Linear(4, 4).requires_grad_(False)
    pair = LowRank(torch.ones(50, 4), torch.ones(4, 50))
    x = torch.ones(400, 1, 4)
    own = layer(x)
    sure = linear(layer, "a", x, Delta({"a": pair})) - own
    torch.manual_seed(0)
    unsure = linear(layer, "a", x, Delta({"a": pair}, dropout=0.2)) - own
    assert sure.unique().tolist() == pytest.approx([200], abs=1e-3)
    assert unsure.mean().item() == pytest.approx(200, rel=0.01)
    # Whole components drop out: what is left is a multiple of one component, 4 / 0.8.
    steps = unsure[:, 0, 0] / 5
    torch.testing.assert_close(steps, steps.round(), rtol=0, atol=1e-3)


# --- names and errors


def test_the_layers_that_a_delta_can_change():
    model = small_model("vit_tiny")
    layers = target_layers(model)
    assert list(layers) == [
        f"blocks.{i}.{layer}"
        for i in range(3)
        for layer in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    ]
    for name, layer in layers.items():
        assert layer is model.get_submodule(name)


def test_the_parts_of_a_layer_cover_its_rows_once():
    name = "blocks.0.mlp.fc1"
    assert list(parts(name, nn.Linear(4, 8))) == [(name, slice(None))]
    assert list(parts("blocks.7.attn.qkv", nn.Linear(4, 9))) == [
        ("blocks.7.attn.q", slice(0, 3)),
        ("blocks.7.attn.k", slice(3, 6)),
        ("blocks.7.attn.v", slice(6, 9)),
    ]


@pytest.mark.parametrize(
    "name", ["blocks.3.attn.q", "blocks.0.attn.qkv", "blocks.0.q", "head", "blocks.0.mlp.q", ""]
)
def test_a_layer_that_the_model_lacks_is_refused(name):
    model = small_model("vit_tiny")
    pair = LowRank(torch.zeros(2, model.embed_dim), torch.zeros(model.embed_dim, 2))
    message = re.escape(f"the model has no layer {name!r} that a delta could change")
    for check in (check_delta, fold):
        with pytest.raises(DeltaError, match=message):
            check(model, Delta({name: pair}))


@pytest.mark.parametrize(
    ("name", "down", "up", "message"),
    [
        ("attn.q", (2, 191), (192, 2), r"192 -> 192 .* got \(2, 191\) and \(192, 2\)"),
        ("attn.q", (2, 192), (576, 2), r"192 -> 192 .* got \(2, 192\) and \(576, 2\)"),
        ("attn.q", (2, 192), (192, 3), r"192 -> 192 .* got \(2, 192\) and \(192, 3\)"),
        ("attn.proj", (192,), (192, 192), r"192 -> 192 .* got \(192,\) and \(192, 192\)"),
        ("attn.proj", (2, 192), (192,), r"192 -> 192 .* got \(2, 192\) and \(192,\)"),
        ("mlp.fc1", (2, 192), (192, 2), r"192 -> 768 .* down \[k, 192\] and up \[768, k\], got"),
        ("mlp.fc2", (2, 192), (192, 2), r"768 -> 192 .* down \[k, 768\] and up \[192, k\], got"),
    ],
)
def test_another_shape_is_refused(name, down, up, message):
    model = small_model("vit_tiny")
    pair = LowRank(torch.zeros(down), torch.zeros(up))
    for check in (check_delta, fold):
        with pytest.raises(DeltaError, match=rf"blocks\.1\.{name} takes {message}"):
            check(model, Delta({f"blocks.1.{name}": pair}))


def test_what_fits_passes():
    for kind in KINDS:
        model = small_model(kind)
        check_delta(model, drawn_delta(model))


def test_a_gated_mlp_takes_no_delta_and_says_so():
    # Its layers are called fc1 and fc2 too, but its forward is not fc2(act(fc1(x))).
    model = timm.create_model(
        "vit_giant_patch14_dinov2", img_size=28, depth=1, embed_dim=48, num_heads=3, num_classes=5
    )
    model = model.eval().requires_grad_(False)
    assert list(target_layers(model)) == ["blocks.0.attn.qkv", "blocks.0.attn.proj"]
    mlp = model.blocks[0].mlp
    pair = LowRank(torch.zeros(2, 48), torch.zeros(mlp.fc1.out_features, 2))
    with pytest.raises(DeltaError, match=r"no layer 'blocks\.0\.mlp\.fc1'"):
        check_delta(model, Delta({"blocks.0.mlp.fc1": pair}))
    delta = Delta({"blocks.0.attn.q": LowRank(torch.ones(2, 48), torch.ones(48, 2))})
    images = pictures(model)
    torch.testing.assert_close(
        forward(model, images, 0, delta), forward(model, images, 0, fold(model, delta))
    )
