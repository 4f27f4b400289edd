"""Segmenter's decoders: from the features of patches to scores of classes for each.

Letters: B pictures, N = h w patches, D channels of the encoder, C of the decoder, K classes.
Reference: Segmenter, arXiv:2105.05633, section 3.2.
"""

from typing import Any, Literal, TypeAlias

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from adapters.schema import Count, Strict

#: Channels of a head where a recipe does not say how many heads there are, as in DeiT.
HEAD_WIDTH = 64


class DecoderInfo(Strict):
    """A decoder, as a task says which it has."""

    kind: Literal["linear", "mask"] = Field(
        description="one linear layer; or a Mask Transformer, which has a token for each class"
    )
    layers: int = Field(2, ge=0, le=100, description="blocks of a Mask Transformer")
    width: Count | None = Field(None, description="channels of a Mask Transformer")
    heads: Count | None = Field(None, description="of its attention")

    @model_validator(mode="after")
    def _whole_heads(self) -> "DecoderInfo":
        if self.kind == "mask" and (self.width is None or self.heads is None):
            raise ValueError("a Mask Transformer has a width and heads")
        if self.width is not None and self.heads is not None and self.width % self.heads:
            raise ValueError(
                f"the width of a Mask Transformer is a multiple of its heads, got {self.width} "
                f"for {self.heads}"
            )
        return self

    def build(self, inputs: int, classes: int, dropout: float = 0.0) -> "Decoder":
        """Return the decoder, at random.

        Args:
            inputs: channels D of the encoder.
            classes: K.
            dropout: in the blocks of a Mask Transformer, while it is trained.
        """
        if self.kind == "linear":
            return LinearDecoder(inputs, classes)
        assert self.width is not None
        assert self.heads is not None
        return MaskTransformer(inputs, classes, self.layers, self.width, self.heads, dropout)


class LinearDecoder(nn.Module):
    """One linear layer."""

    def __init__(self, inputs: int, classes: int) -> None:
        """Make it for `inputs` channels and so many classes."""
        super().__init__()
        self.head = nn.Linear(inputs, classes)
        _draw(self)

    def forward(self, features: Tensor) -> Tensor:
        """Return scores [B, K, h, w] of features [B, D, h, w]."""
        scores: Tensor = self.head(features.movedim(1, 3))
        return scores.movedim(3, 1)

    def macs(self, patches: int) -> int:
        """Return its multiply-adds for a picture of so many patches."""
        return patches * self.head.weight.numel()


class MaskTransformer(nn.Module):
    """Blocks of a transformer on patches and class embeddings; masks are their products."""

    def __init__(
        self,
        inputs: int,
        classes: int,
        layers: int,
        width: int,
        heads: int,
        dropout: float = 0.0,
    ) -> None:
        """Make it; `DecoderInfo` says what the arguments are."""
        super().__init__()
        self.project = nn.Linear(inputs, width)
        self.classes = nn.Parameter(torch.empty(1, classes, width))
        self.blocks = nn.ModuleList(
            Block(width, heads, qkv_bias=True, proj_drop=dropout, attn_drop=dropout)
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)
        self.patch_projection = nn.Linear(width, width, bias=False)
        self.class_projection = nn.Linear(width, width, bias=False)
        self.mask_norm = nn.LayerNorm(classes)
        _draw(self)
        nn.init.trunc_normal_(self.classes, std=0.02)
        for layer in (self.patch_projection, self.class_projection):
            nn.init.normal_(layer.weight, std=width**-0.5)

    def forward(self, features: Tensor) -> Tensor:
        """Return scores [B, K, h, w] of features [B, D, h, w]."""
        grid, count = features.shape[2:], self.classes.shape[1]
        patches = self.project(features.flatten(2).transpose(1, 2))
        x = torch.cat([patches, self.classes.expand(len(patches), -1, -1)], dim=1)
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        patches = F.normalize(self.patch_projection(x[:, :-count]), dim=-1)
        classes = F.normalize(self.class_projection(x[:, -count:]), dim=-1)
        masks: Tensor = self.mask_norm(patches @ classes.transpose(1, 2))  # [B, N, K]
        return masks.transpose(1, 2).reshape(-1, count, *grid)

    def macs(self, patches: int) -> int:
        """Return its multiply-adds for a picture of so many patches."""
        count, width = self.classes.shape[1:]
        tokens, macs = patches + count, patches * self.project.weight.numel()
        for block in self.blocks:
            layers: Any = block
            linear = sum(each.weight.numel() for each in layers.modules() if _is_linear(each))
            macs += tokens * linear + 2 * tokens**2 * width
        return int(macs + tokens * width**2 + patches * count * width)


Decoder: TypeAlias = LinearDecoder | MaskTransformer


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear)


def _draw(module: nn.Module) -> None:
    """Give the linear layers the start that timm gives those of a transformer."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
