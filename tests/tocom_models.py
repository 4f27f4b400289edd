"""Small randomly initialised timm models, one of each supported kind."""

import copy
import functools

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

SMALL = {"img_size": 64, "depth": 3, "num_classes": 10}

#: name -> (timm architecture, constructor arguments)
KINDS: dict[str, tuple[str, dict[str, object]]] = {
    "vit_tiny": ("vit_tiny_patch16_224", {}),
    "vit_small": ("vit_small_patch16_224", {}),
    "deit_tiny_distilled": ("deit_tiny_distilled_patch16_224", {}),
    "deit3_small": ("deit3_small_patch16_224", {"init_values": 0.1}),  # LayerScale
    "dinov2_registers": ("vit_small_patch14_reg4_dinov2", {"img_size": 56, "init_values": 0.1}),
    "qk_norm": ("vit_tiny_patch16_224", {"qk_norm": True}),
    "pre_norm": ("vit_tiny_patch16_224", {"pre_norm": True}),  # as CLIP's
    "global_pool": ("vit_tiny_patch16_224", {"global_pool": "avg"}),  # as MAE models fine-tune
    "no_prefix": ("vit_tiny_patch16_224", {"global_pool": "avg", "class_token": False}),
}


def small_model(kind: str = "vit_tiny", seed: int = 0) -> VisionTransformer:
    """Return a model of `kind`, the caller's own, with all weights away from a trivial start."""
    model = copy.deepcopy(_drawn(kind, seed))
    torch.manual_seed(seed)  # what the caller draws next is the same, drawn or remembered
    return model


def pictures(
    model: VisionTransformer, batch: int = 3, size: tuple[int, int] | None = None
) -> Tensor:
    """Return noise [B, 3, H, W] of the model's image size or another, always the same."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, 3, *(size or model.patch_embed.img_size), generator=generator)


@functools.cache
def _drawn(kind: str, seed: int) -> VisionTransformer:
    torch.manual_seed(seed)
    architecture, arguments = KINDS[kind]
    model = timm.create_model(architecture, **(SMALL | arguments))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=parameter.mean().item(), std=0.05)
    return model.eval().requires_grad_(False)
