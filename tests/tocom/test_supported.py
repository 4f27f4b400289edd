"""Which models are supported: every kind that is refused is refused by its name."""

import pytest
import timm
import torch
from timm.layers import Attention
from timm.models.vision_transformer import (
    ParallelScalingBlock,
    ParallelThingsBlock,
    ResPostBlock,
    VisionTransformer,
)

from tests.tocom_models import KINDS, small_model
from tocom import UnsupportedModelError, check_supported


class GatedAttention(Attention):
    """A subclass may compute anything."""


def gated():
    model = small_model("vit_tiny")
    attention = model.blocks[1].attn
    attention.gate = torch.nn.Linear(attention.qkv.in_features, attention.proj.in_features)
    return model


def vit(**arguments):
    return VisionTransformer(
        img_size=32, patch_size=16, embed_dim=24, depth=2, num_heads=2, num_classes=3, **arguments
    )


REFUSED = {
    "parallel scaling": (
        lambda: vit(block_fn=ParallelScalingBlock),
        "the block ParallelScalingBlock",
    ),
    "parallel things": (lambda: vit(block_fn=ParallelThingsBlock), "the block ParallelThingsBlock"),
    "post norm": (lambda: vit(block_fn=ResPostBlock), "the block ResPostBlock"),
    "gated": (gated, "gated attention"),
    "another attention": (
        lambda: vit(attn_layer=GatedAttention),
        "the attention GatedAttention",
    ),
    "differential": (lambda: vit(attn_layer="diff"), "the attention DiffAttention"),
    "attention pooling": (
        lambda: vit(global_pool="map"),
        r"attention pooling \(AttentionPoolLatent\)",
    ),
    "max pooling": (lambda: vit(global_pool="max"), "global pooling 'max'"),
    "average and max": (lambda: vit(global_pool="avgmax"), "global pooling 'avgmax'"),
    "no pooling": (lambda: vit(global_pool=""), "global pooling ''"),
    "RoPE": (
        lambda: timm.create_model("eva02_tiny_patch14_224", depth=1, img_size=28),
        "the class Eva",
    ),
    "hybrid stem": (
        lambda: timm.create_model("vit_tiny_r_s16_p8_224", depth=1, img_size=32),
        "the stem HybridEmbed",
    ),
    "windows": (
        lambda: timm.create_model("samvit_base_patch16_224", depth=1, embed_dim=24, num_heads=2),
        "the class VisionTransformerSAM",
    ),
    "shifted windows": (
        lambda: timm.create_model("swin_tiny_patch4_window7_224", depths=(1, 1), embed_dim=12),
        "the class SwinTransformer",
    ),
    "relative positions": (
        lambda: timm.create_model("vit_relpos_small_patch16_224", depth=1),
        "the class VisionTransformerRelPos",
    ),
    "convolutions": (lambda: timm.create_model("resnet10t"), "the class ResNet"),
    "not timm's": (lambda: torch.nn.Linear(1, 1), "the class Linear"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_an_unsupported_model_is_refused_by_name(what):
    build, part = REFUSED[what]
    with pytest.raises(UnsupportedModelError, match=rf"my model: {part} is not supported\. Supp"):
        check_supported(build(), "my model")


def test_only_one_block_need_be_another():
    model = small_model("vit_tiny")
    model.blocks[2] = ResPostBlock(dim=model.embed_dim, num_heads=3)
    with pytest.raises(UnsupportedModelError, match="the model: the block ResPostBlock is not"):
        check_supported(model)


@pytest.mark.parametrize("kind", KINDS)
def test_every_supported_kind_passes(kind):
    check_supported(small_model(kind))
