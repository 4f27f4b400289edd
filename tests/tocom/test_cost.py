"""Multiply-adds in closed form: the published table and a counted run."""

import pytest
import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.tocom_models import KINDS, small_model
from tocom import RateError, cost, forward
from tocom.adapter import Adapter
from tocom.delta import LowRank

#: rate -> (GMACs of DeiT-Ti, -S, -B at 224 px, tokens after the last block); see oracle/README.md
TABLE = {
    0: (1.2537, 4.5989, 17.5638, 197),
    4: (1.0918, 4.0074, 15.3274, 149),
    8: (0.9290, 3.4211, 13.1086, 101),
    12: (0.7726, 2.8475, 10.9149, 53),
    13: (0.7346, 2.7061, 10.3704, 41),
    16: (0.6245, 2.2937, 8.7747, 11),
    20: (0.5126, 1.8715, 7.1357, 4),
    24: (0.4359, 1.5819, 6.0107, 2),
}


def on_no_device(architecture, **arguments):
    """A model with shapes and without weights: costs neither memory nor time."""
    with torch.device("meta"):
        return timm.create_model(architecture, **arguments).eval().requires_grad_(False)


def counted(model, rate, image_size=None, adapter=None):
    """Multiply-adds of a run, as PyTorch counts them."""
    device = next(model.parameters()).device
    size = image_size or model.patch_embed.img_size
    images = torch.zeros(1, 3, *size, device=device)
    for block in model.blocks:
        block.attn.fused_attn = False  # as two products, which every version counts
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        forward(model, images, rate, adapter=adapter)
    return counter.get_total_flops() / 2


@pytest.mark.parametrize("size", ["tiny", "small", "base"])
def test_the_published_table(size):
    model = on_no_device(f"deit_{size}_patch16_224")
    column = ["tiny", "small", "base"].index(size)
    for rate, row in TABLE.items():
        spent = cost(model, rate)
        assert spent.macs / 1e9 == pytest.approx(row[column], rel=1e-3)
        assert spent.plan.tokens[-1] == row[3]


@pytest.mark.parametrize(
    ("size", "rate"),
    [("tiny", 0), ("tiny", 1), ("tiny", 13), ("small", 8), ("small", (10, -0.5)), ("base", 24)],
)
def test_a_counted_run_of_deit(size, rate):
    model = on_no_device(f"deit_{size}_patch16_224")
    assert cost(model, rate).macs == counted(model, rate)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rate", [0, 2, (3, 0.5), 99])
def test_a_counted_run_of_every_kind(kind, rate):
    model = small_model(kind)
    assert cost(model, rate).macs == counted(model, rate)


def test_a_counted_run_with_a_task_beside_it():
    model = small_model("vit_tiny")
    width = model.embed_dim
    adapter = Adapter([LowRank(torch.zeros(5, width), torch.zeros(width, 5)) for _ in model.blocks])
    spent = [cost(model, rate, adapter=adapter).macs for rate in (0, 3)]
    assert spent == [counted(model, rate, adapter=adapter) for rate in (0, 3)]


def test_a_counted_run_with_a_gated_mlp():
    model = on_no_device("vit_giant_patch14_dinov2", depth=2, img_size=56, num_classes=7)
    assert cost(model, 3).macs == counted(model, 3)


@pytest.mark.parametrize("size", [(224, 224), (96, 160), (384, 128)])
def test_another_image_size(size):
    model = on_no_device("vit_tiny_patch16_224", depth=3, dynamic_img_size=True)
    spent = cost(model, 4, image_size=size)
    assert spent.plan.tokens_in == size[0] * size[1] // 256 + 1
    assert spent.macs == counted(model, 4, size)
    assert (cost(model, 4).macs == spent.macs) == (size == (224, 224))


def test_a_size_that_is_padded_to_whole_patches():
    model = on_no_device(
        "vit_tiny_patch16_224", depth=1, dynamic_img_size=True, dynamic_img_pad=True
    )
    assert cost(model, 0, image_size=(100, 50)).plan.tokens_in == 7 * 4 + 1
    assert cost(model, 0, image_size=(100, 50)).macs == counted(model, 0, (100, 50))


def test_the_parts_make_the_whole():
    model = on_no_device("deit_tiny_distilled_patch16_224")
    spent = cost(model, 8)
    assert spent.macs == spent.embedding + sum(spent.blocks) + spent.head
    assert spent.embedding == 196 * 768 * 192
    assert spent.head == 2 * 1000 * 192  # the class token's and the distillation token's
    assert len(spent.blocks) == 12
    assert list(spent.blocks) == sorted(spent.blocks, reverse=True)
    assert len(set(spent.blocks)) == 12


def test_a_model_without_a_head_spends_nothing_on_it():
    assert cost(on_no_device("deit_tiny_patch16_224", num_classes=0)).head == 0


def test_a_higher_rate_never_costs_more_from_rate_2_on():
    # Rate 1 saves less than its matching costs where tokens are few.
    model = on_no_device("deit_tiny_patch16_224")
    spent = [cost(model, rate).macs for rate in range(2, 40)]
    assert spent == sorted(spent, reverse=True)


def test_a_malformed_rate_is_refused():
    with pytest.raises(RateError, match="rate must be 0 or more, got -1"):
        cost(on_no_device("deit_tiny_patch16_224"), -1)
