"""Models with fewer channels: in queries and keys, in values and inside MLPs, block by block.

Such a model is timm's but for the layers that became narrower, so that everything that runs a
model runs it as it is. All heads of a block are alike. Channels of a token stay, and so does the
scale of attention: that of the model before it was pruned. Which channels go is not decided here.

Reference: CAIT, consistent dynamic channel pruning, whose result this is.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Attention
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from tocom.errors import BackboneError


@dataclass(frozen=True)
class Channels:
    """The channels of a pruned model, one number a block.

    Attributes:
        qk: of a query and of a key, in each head.
        v: of a value, in each head.
        hidden: inside the MLP.
    """

    qk: tuple[int, ...]
    v: tuple[int, ...]
    hidden: tuple[int, ...]

    @classmethod
    def of(cls, model: VisionTransformer) -> "Channels | None":
        """Return those of a model; None if it is not pruned."""
        blocks: list[Any] = list(model.blocks)
        if not all(isinstance(block.attn, PrunedAttention) for block in blocks):
            return None
        widths = [(*block.attn.qkv.widths, block.attn.num_heads) for block in blocks]
        return cls(
            qk=tuple(q // heads for q, _, _, heads in widths),
            v=tuple(v // heads for _, _, v, heads in widths),
            hidden=tuple(block.mlp.fc1.out_features for block in blocks),
        )

    @classmethod
    def read(cls, said: Any, model: VisionTransformer) -> "Channels":
        """Return what a `config.json` says.

        Args:
            said: the entry.
            model: the one that is to be narrowed.

        Raises:
            BackboneError: naming the first entry that cannot be.
        """
        widest = {
            "qk": [block.attn.head_dim for block in model.blocks],
            "v": [block.attn.head_dim for block in model.blocks],
            "hidden": [block.mlp.fc1.out_features for block in model.blocks],
        }
        if not isinstance(said, dict) or said.keys() != widest.keys():
            raise BackboneError(f"pruned must say {', '.join(widest)}, got {said!r:.100}")
        for key, most in widest.items():
            fits = isinstance(said[key], list) and len(said[key]) == len(most)
            for width, top in zip(said[key] if fits else (), most, strict=False):
                fits = fits and type(width) is int and 1 <= width <= top
            if not fits:
                raise BackboneError(
                    f"pruned.{key} must be {len(most)} whole numbers from 1 to {max(most)}, got "
                    f"{said[key]!r:.100}"
                )
        return cls(**{key: tuple(said[key]) for key in widest})

    @property
    def said(self) -> dict[str, list[int]]:
        """What a `config.json` says of them."""
        return {key: list(widths) for key, widths in asdict(self).items()}


class PrunedQKV(nn.Linear):
    """Queries, keys and values of all heads, side by side and not equally wide.

    Attributes:
        widths: channels of the queries, of the keys and of the values.
    """

    def __init__(self, inputs: int, widths: Sequence[int], bias: bool) -> None:
        """Make a layer whose weights are yet to be set."""
        super().__init__(inputs, sum(widths), bias)
        self.widths = tuple(widths)


class PrunedAttention(Attention):  # type: ignore[misc]  # timm ships no types
    """timm's attention with fewer channels; `head_dim` and `scale` are those of before."""

    def __init__(self, before: Attention, qk: int, v: int) -> None:
        """Make narrower layers whose weights are yet to be set.

        Args:
            before: the layer, of which all else is taken over.
            qk: channels of a query and of a key, in each head.
            v: channels of a value, in each head.
        """
        nn.Module.__init__(self)  # timm's own would make layers of its widths
        heads, width = before.num_heads, before.qkv.in_features
        self.num_heads, self.head_dim, self.scale = heads, before.head_dim, before.scale
        self.attn_dim = heads * v
        self.fused_attn = before.fused_attn
        self.qkv = PrunedQKV(
            width, (heads * qk, heads * qk, heads * v), before.qkv.bias is not None
        )
        self.widths = self.qkv.widths
        self.q_norm, self.k_norm, self.norm = nn.Identity(), nn.Identity(), nn.Identity()
        self.attn_drop, self.proj_drop, self.gate = before.attn_drop, before.proj_drop, None
        self.proj = nn.Linear(heads * v, before.proj.out_features, before.proj.bias is not None)

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """Return what timm's forward does; `tocom.forward` does not come here."""
        q, k, v = split(self, self.qkv(x))
        dropout = self.attn_drop.p if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, attn_mask, dropout, is_causal, scale=self.scale)
        projected: Tensor = self.proj_drop(self.proj(y.transpose(1, 2).flatten(2)))
        return projected


def widths(layer: nn.Linear) -> tuple[int, int, int]:
    """Return the channels of queries, keys and values of a layer that holds all three."""
    if isinstance(layer, PrunedQKV):
        q, k, v = layer.widths
        return q, k, v
    third = layer.out_features // 3
    return third, third, third


def split(attention: Attention, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return q [B, H, N, d], k [B, H, N, d] and v [B, H, N, e] of `qkv` [B, N, H (2 d + e)]."""
    pruned = isinstance(attention, PrunedAttention)  # whose layer PEFT may have wrapped
    channels = list(attention.widths if pruned else widths(attention.qkv))
    heads = attention.num_heads
    q, k, v = (
        part.reshape(*part.shape[:-1], heads, part.shape[-1] // heads).transpose(1, 2)
        for part in torch.split(qkv, channels, dim=-1)
    )
    return q, k, v


def refusal(model: VisionTransformer) -> str | None:
    """Return why no channels can be taken from a model; None if they can."""
    for block in model.blocks:
        if not all(
            isinstance(norm, nn.Identity)
            for norm in (block.attn.q_norm, block.attn.k_norm, block.attn.norm, block.mlp.norm)
        ):
            return "a norm sees all channels of its queries, keys, values or MLPs"
        if not (isinstance(block.mlp.fc1, nn.Linear) and isinstance(block.mlp.fc2, nn.Linear)):
            return "its MLPs are not two linear layers"
    return None


def narrow(model: VisionTransformer, channels: Channels) -> VisionTransformer:
    """Give a model narrower layers, in place, whose weights are yet to be set.

    Args:
        model: one without a `refusal`.
        channels: what it is to have.
    """
    for i, block in enumerate(model.blocks):
        parameter = block.attn.qkv.weight
        block.attn = PrunedAttention(block.attn, channels.qk[i], channels.v[i]).to(parameter)
        mlp, hidden = block.mlp, channels.hidden[i]
        width, bias = model.embed_dim, mlp.fc1.bias is not None
        mlp.fc1 = nn.Linear(width, hidden, bias).to(parameter)
        mlp.fc2 = nn.Linear(hidden, width, mlp.fc2.bias is not None).to(parameter)
    return model
