"""Segmenter's decoders against what the paper says, step by step."""

import pytest
import torch
from pydantic import ValidationError
from torch.utils.flop_counter import FlopCounterMode

from adapters.segmentation import DecoderInfo, MaskTransformer

MASK = DecoderInfo(kind="mask", layers=2, width=16, heads=2)


def small(inputs=12, classes=5, info=MASK):
    torch.manual_seed(0)
    decoder = info.build(inputs, classes).eval().requires_grad_(False)
    for parameter in decoder.parameters():
        torch.nn.init.normal_(parameter, mean=parameter.mean().item(), std=0.3)
    return decoder


def test_masks_are_products_of_patches_and_classes_after_the_blocks():
    decoder = small()
    assert isinstance(decoder, MaskTransformer)
    features = torch.randn(2, 12, 3, 4)
    found = decoder(features)
    assert found.shape == (2, 5, 3, 4)
    for i in range(2):
        patches = [
            decoder.project.weight @ features[i, :, row, column] + decoder.project.bias
            for row in range(3)
            for column in range(4)
        ]
        x = torch.stack([*patches, *decoder.classes[0]])
        for block in decoder.blocks:
            x = block(x[None])[0]
        x = decoder.norm(x)
        for place in range(12):
            own = decoder.patch_projection.weight @ x[place]
            masks = []
            for label in range(5):
                of_class = decoder.class_projection.weight @ x[12 + label]
                masks.append(own @ of_class / own.norm() / of_class.norm())
            scores = torch.stack(masks)
            scores = (scores - scores.mean()) / (scores.var(unbiased=False) + 1e-5).sqrt()
            scores = scores * decoder.mask_norm.weight + decoder.mask_norm.bias
            torch.testing.assert_close(
                found[i, :, place // 4, place % 4], scores, rtol=1e-4, atol=1e-4
            )


def test_the_linear_decoder_is_one_layer():
    decoder = small(info=DecoderInfo(kind="linear"))
    features = torch.randn(2, 12, 3, 4)
    expected = torch.einsum("kd,bdhw->bkhw", decoder.head.weight, features)
    torch.testing.assert_close(decoder(features), expected + decoder.head.bias[:, None, None])


@pytest.mark.parametrize("info", [MASK, DecoderInfo(kind="linear")], ids=["mask", "linear"])
def test_what_it_costs_is_that_of_a_counted_run(info):
    decoder = small(info=info)
    for block in getattr(decoder, "blocks", ()):
        block.attn.fused_attn = False  # as two products, which every version counts
    with FlopCounterMode(display=False) as counter:
        decoder(torch.zeros(1, 12, 3, 4))
    assert decoder.macs(12) == counter.get_total_flops() / 2


def test_what_no_decoder_can_have_is_refused():
    with pytest.raises(ValidationError, match="a Mask Transformer has a width and heads"):
        DecoderInfo(kind="mask")
    with pytest.raises(ValidationError, match="multiple of its heads, got 10 for 4"):
        DecoderInfo(kind="mask", width=10, heads=4)
