"""Which models are supported: those whose forward `vit` reproduces."""

from timm.layers import Attention, PatchEmbed
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block, VisionTransformer

from tocom.errors import UnsupportedModelError
from tocom.pruned import PrunedAttention


def check_supported(model: object, name: str = "the model") -> None:
    """Raise UnsupportedModelError, naming the part, unless `tocom.forward` reproduces the model."""

    def refuse(what: str) -> None:
        raise UnsupportedModelError(
            f"{name}: {what} is not supported. Supported are timm's VisionTransformer and "
            "VisionTransformerDistilled with plain blocks: class, distillation and register "
            "tokens, LayerScale, qk-norm, pre-norm, token or average pooling."
        )

    if type(model) not in (VisionTransformer, VisionTransformerDistilled):
        refuse(f"the class {type(model).__name__}")
    assert isinstance(model, VisionTransformer)
    if type(model.patch_embed) is not PatchEmbed:
        refuse(f"the stem {type(model.patch_embed).__name__}")
    if model.attn_pool is not None:
        refuse(f"attention pooling ({type(model.attn_pool).__name__})")
    if model.global_pool not in ("token", "avg"):
        refuse(f"global pooling {model.global_pool!r}")
    for block in model.blocks:
        if type(block) is not Block:
            refuse(f"the block {type(block).__name__}")
        if type(block.attn) not in (Attention, PrunedAttention):
            refuse(f"the attention {type(block.attn).__name__}")
        if getattr(block.attn, "gate", None) is not None:
            refuse("gated attention")
