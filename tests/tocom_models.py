"""Small randomly initialised timm models, one of each supported kind."""

import timm
import torch
from timm.models.vision_transformer import VisionTransformer

SMALL = {"img_size": 64, "depth": 3, "num_classes": 10}

#: name -> (timm architecture, constructor arguments)
KINDS: dict[str, tuple[str, dict[str, object]]] = {
    "vit_tiny": ("vit_tiny_patch16_224", {}),
    "vit_small": ("vit_small_patch16_224", {}),
    "deit_tiny_distilled": ("deit_tiny_distilled_patch16_224", {}),
    "deit3_small": ("deit3_small_patch16_224", {"init_values": 0.1}),  # LayerScale
    "dinov2_registers": ("vit_small_patch14_reg4_dinov2", {"img_size": 56, "init_values": 0.1}),
    "qk_norm": ("vit_tiny_patch16_224", {"qk_norm": True}),
    "global_pool": ("vit_tiny_patch16_224", {"global_pool": "avg"}),  # as MAE models fine-tune
    "no_prefix": ("vit_tiny_patch16_224", {"global_pool": "avg", "class_token": False}),
}


def small_model(kind: str = "vit_tiny", seed: int = 0) -> VisionTransformer:
    """Build a model of `kind` whose weights are all away from their trivial start."""
    torch.manual_seed(seed)
    architecture, arguments = KINDS[kind]
    model = timm.create_model(architecture, **(SMALL | arguments))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=parameter.mean().item(), std=0.05)
    return model.eval().requires_grad_(False)
