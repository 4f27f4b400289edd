"""Attention with the size bias: beside timm's own layer, a slow reference and repeated tokens."""

import pytest
import torch
from timm.layers import Attention, LayerNorm

from tests.tocom.slow_reference import slow_attention
from tocom.attention import answer, look

B, N, D, H = 2, 11, 24, 3
VARIANTS = {
    "plain": {},
    "no_bias": {"qkv_bias": False, "proj_bias": False},
    "qk_norm": {"qk_norm": True, "norm_layer": LayerNorm},
    "scale_norm": {"scale_norm": True, "norm_layer": LayerNorm},
}


def attend(attention, name, x, size, delta):
    seen = look(attention, name, x, size, delta)
    return answer(attention, name, seen, delta), seen.k


def layer(fused=True, **arguments):
    torch.manual_seed(0)
    attention = Attention(D, num_heads=H, **({"qkv_bias": True} | arguments)).eval()
    for parameter in attention.parameters():
        torch.nn.init.normal_(parameter, mean=parameter.mean().item(), std=0.3)
    attention.fused_attn = fused
    return attention.requires_grad_(False)


def drawn():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(B, N, D, generator=generator)
    size = torch.randint(1, 6, (B, N, 1), generator=generator).float()
    return x, size


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("variant", VARIANTS)
def test_without_sizes_it_is_timms_layer_bit_for_bit(variant, fused):
    attention = layer(fused, **VARIANTS[variant])
    x, _ = drawn()
    assert torch.equal(attend(attention, "a", x, None, None)[0], attention(x))
    ones = torch.ones(B, N, 1)
    torch.testing.assert_close(attend(attention, "a", x, ones, None)[0], attention(x))


@pytest.mark.parametrize("fused", [True, False])
def test_a_scale_that_was_changed_is_what_timm_makes_of_it(fused):
    attention = layer(fused)
    x, _ = drawn()
    before = attention(x)
    attention.scale *= 3  # as pruning may leave it; timm's fused path does not read it
    assert torch.equal(attention(x), before) == fused
    assert torch.equal(attend(attention, "a", x, None, None)[0], attention(x))


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_size_bias_equals_the_formula(variant, fused):
    attention = layer(fused, **VARIANTS[variant])
    x, size = drawn()
    y, keys = attend(attention, "a", x, size, None)
    for i in range(B):
        q, k, v = attention.qkv(x[i]).reshape(N, 3, H, D // H).permute(1, 2, 0, 3).double()
        q, k = (
            norm.double()(part) for norm, part in ((attention.q_norm, q), (attention.k_norm, k))
        )
        attention.float()
        slow = slow_attention(q, k, v, size[i, :, 0].double())
        slow = attention.norm(slow.transpose(0, 1).reshape(N, D).float())
        torch.testing.assert_close(y[i], attention.proj(slow), rtol=0, atol=1e-5)
        torch.testing.assert_close(keys[i], k.float(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("fused", [True, False])
def test_a_token_of_size_three_counts_as_three_such_tokens(fused):
    attention = layer(fused)
    x, size = drawn()
    y, _ = attend(attention, "a", x[:1], size[:1], None)
    repeats = size[0, :, 0].long()
    repeated = x[:1].repeat_interleave(repeats, dim=1)
    expected = attention(repeated)[:, (repeats.cumsum(0) - 1)]
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("fused", [True, False])
def test_dropout_is_timms_own_under_the_same_seed(fused):
    attention = layer(fused, attn_drop=0.4, proj_drop=0.3).train()
    x, _ = drawn()
    torch.manual_seed(5)
    expected = attention(x)
    torch.manual_seed(5)
    assert torch.equal(attend(attention, "a", x, None, None)[0], expected)
    assert not torch.equal(attend(attention, "a", x, None, None)[0], expected)
    attention.eval()
    assert torch.equal(attend(attention, "a", x, None, None)[0], attention(x))


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_half_precision(dtype, fused):
    attention = layer(fused)
    x, size = drawn()
    exact, _ = attend(attention, "a", x, size, None)
    y, keys = attend(attention.to(dtype), "a", x.to(dtype), size, None)
    assert y.dtype == keys.dtype == dtype
    # Five roundings one after another (x and weights, qkv, weights of the softmax, y, output)
    # of half an eps each, of values up to the largest.
    limit = 5 * torch.finfo(dtype).eps / 2 * exact.abs().max().item()
    torch.testing.assert_close(y.float(), exact, rtol=0, atol=2 * limit)


def test_an_empty_batch_is_an_empty_answer():
    attention = layer()
    y, keys = attend(attention, "a", torch.zeros(0, N, D), torch.ones(0, N, 1), None)
    assert y.shape == (0, N, D)
    assert keys.shape == (0, H, N, D // H)
