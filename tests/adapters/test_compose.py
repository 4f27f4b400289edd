"""The arithmetic of deltas, and both of their forms through a model."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adapters import BackboneInfo, compose, compose_steps, import_reference
from adapters.bank import target_names
from tests import oracle_case
from tests.adapters.banks import ALL_TARGETS, backbone_of, random_bank
from tests.tocom_models import small_model
from tocom import Delta, RateError, fold, forward

BANK = random_bank(targets=ALL_TARGETS)
LAYERS = target_names(BANK.info)
rates = st.integers(0, BANK.info.max_rate)


def weight(delta: Delta, layer: str) -> torch.Tensor:
    pair = delta.pairs.get(layer)
    return torch.zeros((), dtype=torch.float64) if pair is None else (pair.up @ pair.down).double()


def slow_reference(layer: str, source: int, target: int) -> torch.Tensor:
    """Add or subtract one step after the other, in double precision."""
    down, up = BANK.tensors[f"{layer}.A"].double(), BANK.tensors[f"{layer}.B"].double()
    total = torch.zeros(up.shape[1], down.shape[2], dtype=torch.float64)
    for i in range(source, target):
        total += BANK.info.scale * up[i] @ down[i]
    for i in range(target, source):
        total -= BANK.info.scale * up[i] @ down[i]
    return total


@given(source=rates, target=rates)
@settings(deadline=None)
def test_a_delta_is_the_sum_of_its_steps(source, target):
    delta = compose(BANK, source, target)
    for layer in LAYERS:
        difference = weight(delta, layer) - slow_reference(layer, source, target)
        assert difference.abs().max() < 1e-5


@given(m=rates, n=rates, k=rates)
@settings(deadline=None)
def test_deltas_add_up(m, n, k):
    direct, first, second = compose(BANK, m, k), compose(BANK, m, n), compose(BANK, n, k)
    for layer in LAYERS:
        difference = weight(first, layer) + weight(second, layer) - weight(direct, layer)
        assert difference.abs().max() < 1e-5


@given(m=rates, n=rates)
@settings(deadline=None)
def test_the_way_back_is_the_negative(m, n):
    there, back = compose(BANK, m, n), compose(BANK, n, m)
    assert there.pairs.keys() == back.pairs.keys()
    for layer in LAYERS:
        assert torch.equal(weight(back, layer), -weight(there, layer))


@given(rate=rates)
@settings(deadline=None)
def test_staying_changes_nothing(rate):
    assert compose(BANK, rate, rate) == Delta({})


@pytest.mark.parametrize(("source", "target"), [(0, 3), (2, 1)])
def test_another_scale_multiplies_in_place_of_the_banks_own(source, target):
    own = compose(BANK, source, target)
    assert_same(compose(BANK, source, target, None), own)
    assert_same(compose(BANK, source, target, BANK.info.scale), own)
    other = compose(BANK, source, target, 3 * BANK.info.scale)
    for layer in LAYERS:
        assert (weight(other, layer) - 3 * weight(own, layer)).abs().max() < 1e-5


def assert_same(one: Delta, other: Delta) -> None:
    for layer in LAYERS:
        assert torch.equal(weight(one, layer), weight(other, layer))


def test_pairs_have_the_width_of_their_steps():
    delta = compose(BANK, 3, 1)
    assert len(delta.pairs) == 2 * 6
    assert delta.pairs["blocks.1.mlp.fc1"].down.shape == (2 * 2, 4)
    assert delta.pairs["blocks.1.mlp.fc1"].up.shape == (6, 2 * 2)


def test_a_half_precision_bank_composes_in_fp32():
    delta = compose(random_bank(dtype=torch.float16), 0, 2)
    assert {tensor.dtype for pair in delta.pairs.values() for tensor in pair} == {torch.float32}


def test_gradients_reach_the_steps_between_and_no_others():
    tensors = {name: tensor.clone().requires_grad_() for name, tensor in BANK.tensors.items()}
    delta = compose_steps(tensors, 0.5, 1, 3, dropout=0.1)
    assert delta.dropout == 0.1
    sum(pair.up.sum() + pair.down.sum() for pair in delta.pairs.values()).backward()
    for tensor in tensors.values():
        assert not tensor.grad[0].any()
        assert tensor.grad[1:].all()


@pytest.mark.parametrize("rate", [-1, 4, 1.0, "1", None, True, (1, 0.5)])
def test_rates_outside_the_bank_are_refused(rate):
    with pytest.raises(RateError, match=r"source rate must be in 0\.\.3, got "):
        compose(BANK, rate, 0)
    with pytest.raises(RateError, match=r"target rate must be in 0\.\.3, got "):
        compose(BANK, 0, rate)


@pytest.mark.parametrize("kind", ["vit_tiny", "deit_tiny_distilled", "qk_norm", "global_pool"])
def test_folded_and_low_rank_give_the_same_logits(kind):
    model = small_model(kind)
    bank = random_bank(BackboneInfo.of(backbone_of(model)), targets=ALL_TARGETS)
    small = {name: 0.05 * tensor for name, tensor in bank.tensors.items()}
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    for source, target in [(0, 3), (2, 1)]:
        delta = compose_steps(small, 1.0, source, target)
        low_rank = forward(model, images, target, delta)
        folded = forward(model, images, target, fold(model, delta))
        torch.testing.assert_close(low_rank, folded, rtol=0, atol=1e-4)
        assert (low_rank - forward(model, images, target)).abs().max() > 1e-2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_is_composed_runs_on_a_model_in_half_precision(dtype):
    model = small_model()
    bank = random_bank(BackboneInfo.of(backbone_of(model)), targets=ALL_TARGETS)
    delta = compose(bank, 0, 3, scale=0.002)
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    exact, plain = forward(model, images, 0, delta), forward(model, images)
    change = (exact - plain).norm()
    half = model.to(dtype)
    for form in (delta, delta.to(dtype=dtype), fold(half, delta)):
        logits = forward(half, images.to(dtype), 0, form)
        assert logits.dtype == dtype
        assert (logits - exact).norm() < 0.2 * change
    on_the_fly = forward(half, images.to(dtype), 0, delta)
    assert torch.equal(on_the_fly, forward(half, images.to(dtype), 0, delta.to(dtype=dtype)))


@pytest.mark.parametrize("name", ["tocom", "tocom_rank4"])
def test_pairs_of_rates_agree_with_the_reference(name):
    case, tensors = oracle_case.read(name)
    model = oracle_case.build(case, tensors)
    bank = import_reference(
        oracle_case.FOLDER / f"{name}.safetensors",
        name,
        BackboneInfo.of(backbone_of(model)),
        rank=case["rank"],
        scale=case["scale"],
    )
    assert bank.info.max_rate == case["steps"]
    for source, target in case["pairs"]:
        delta = compose(bank, source, target)
        expected = tensors[f"logits.{source}-{target}"]
        for form in (delta, fold(model, delta)):
            logits = forward(model, tensors["images"], target, form)
            torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)
