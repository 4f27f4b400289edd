"""Deltas: what is added to a backbone's linear layers for one call.

Two forms with the same answer. `Delta` is low-rank and computed on the fly: for training
and for rare rates. `FoldedWeights` holds W + ΔW, made once: for serving. Both are plain
values that go into the forward call; a model is never changed. Where deltas come from
(banks) is not known here.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from timm.layers import Mlp
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from tocom.errors import DeltaError
from tocom.pruned import widths

#: Target name -> (timm's linear layer within a block, which part of its rows, if it is shared).
TARGETS: dict[str, tuple[str, int | None]] = {
    "q": ("attn.qkv", 0),
    "k": ("attn.qkv", 1),
    "v": ("attn.qkv", 2),
    "proj": ("attn.proj", None),
    "fc1": ("mlp.fc1", None),
    "fc2": ("mlp.fc2", None),
}


class LowRank(NamedTuple):
    """A low-rank pair: x -> x downᵀ upᵀ, its scale included."""

    down: Tensor  # [K, in]
    up: Tensor  # [out, K]


@dataclass(frozen=True)
class Delta:
    """A low-rank change of a model.

    It runs on a model of any dtype and device: `linear` converts the pairs in every call. Where
    it is to run often, `to` does that once.

    Attributes:
        pairs: from `blocks.{i}.attn.q` (or k, v, proj; `blocks.{i}.mlp.fc1`, fc2) to its pair.
        dropout: on the K hidden values; the trainer of a bank asks for it, nobody else.
    """

    pairs: Mapping[str, LowRank]
    dropout: float = 0.0

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> "Delta":
        """Return it on another device or in another dtype; None: as it is."""
        pairs = {
            name: LowRank(*(tensor.to(device, dtype) for tensor in pair))
            for name, pair in self.pairs.items()
        }
        return replace(self, pairs=pairs)


@dataclass(frozen=True, eq=False)
class FoldedWeights:
    """Weights that stand in for a model's own: from `blocks.{i}.attn.qkv` to W + ΔW [out, in]."""

    weights: Mapping[str, Tensor]

    @property
    def nbytes(self) -> int:
        """Bytes of the weights."""
        return sum(weight.nbytes for weight in self.weights.values())

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> "FoldedWeights":
        """Return them on another device or in another dtype; None: as they are."""
        return FoldedWeights(
            {name: weight.to(device, dtype) for name, weight in self.weights.items()}
        )


AnyDelta: TypeAlias = Delta | FoldedWeights


def linear(layer: nn.Linear, name: str, x: Tensor, delta: AnyDelta | None) -> Tensor:
    """Apply a linear layer of the model as `delta` changes it.

    Args:
        layer: the model's own layer.
        name: its name in the model, such as `blocks.0.attn.qkv`.
        x: [B, N, in].
        delta: the change; None for the layer as it is.

    Returns:
        [B, N, out].
    """
    if isinstance(delta, FoldedWeights) and (weight := delta.weights.get(name)) is not None:
        return F.linear(x, weight, layer.bias)
    y: Tensor = layer(x)
    if not isinstance(delta, Delta):
        return y
    pairs = [(delta.pairs[part], rows) for part, rows in parts(name, layer) if part in delta.pairs]
    if not pairs:
        return y
    # One product down and one up for all parts of the layer, which costs less than writing to
    # slices of y, above all in the backward: what of `up` is not a part's own rows is zero.
    down = torch.cat([pair.down for pair, _ in pairs]).to(x)  # [K, in]
    up = torch.cat([_spread(pair.up, rows, layer.out_features) for pair, rows in pairs], dim=1)
    hidden = F.dropout(F.linear(x, down), delta.dropout)
    return torch.addmm(y.flatten(0, 1), hidden.flatten(0, 1), up.to(x).t()).view_as(y)


def _spread(up: Tensor, rows: slice, out: int) -> Tensor:
    """Place up [rows, K] among `out` rows, the others zero."""
    start, stop, _ = rows.indices(out)
    return F.pad(up, (0, 0, start, out - stop))


def fold(model: VisionTransformer, delta: Delta) -> FoldedWeights:
    """Add a low-rank delta to copies of the weights it changes; the model stays as it is.

    The copies have the model's dtype. In bf16 they keep a delta only roughly, as bf16 keeps any
    weight: 13 to 53 % of a delta's norm is rounded away. A low-rank delta is kept to 0.2 %.
    Answers are equally near to those in fp32 (docs/banks.md has the figures).

    Raises:
        DeltaError: if the delta names a layer that the model lacks, or has another shape.
    """
    check_delta(model, delta)
    weights: dict[str, Tensor] = {}
    for name, layer in target_layers(model).items():
        for part, rows in parts(name, layer):
            if (pair := delta.pairs.get(part)) is not None:
                weight = weights.setdefault(name, layer.weight.detach().clone())
                # Pairs are fp32: so is the sum, and a weight in half precision rounds it once.
                weight[rows] = weight[rows] + (pair.up @ pair.down).to(weight.device)
    return FoldedWeights(weights)


def folded_bytes(model: VisionTransformer, delta: Delta) -> int:
    """Return the bytes that `fold` would take."""
    return sum(
        layer.weight.nbytes
        for name, layer in target_layers(model).items()
        if any(part in delta.pairs for part, _ in parts(name, layer))
    )


def check_delta(model: VisionTransformer, delta: Delta) -> None:
    """Raise DeltaError unless every pair names a layer of `model` and has its shape."""
    allowed = {
        part: (layer.in_features, len(range(*rows.indices(layer.out_features))))
        for name, layer in target_layers(model).items()
        for part, rows in parts(name, layer)
    }
    for part, pair in delta.pairs.items():
        if part not in allowed:
            raise DeltaError(f"the model has no layer {part!r} that a delta could change")
        inputs, outputs = allowed[part]
        rank = pair.down.shape[0]
        if pair.down.shape != (rank, inputs) or pair.up.shape != (outputs, rank):
            raise DeltaError(
                f"{part} takes {inputs} -> {outputs} channels, down [k, {inputs}] and "
                f"up [{outputs}, k], got {tuple(pair.down.shape)} and {tuple(pair.up.shape)}"
            )


def target_layers(model: VisionTransformer) -> dict[str, nn.Linear]:
    """Return the model's linear layers that a delta can change, by name, in order of use."""
    layers = {}
    for i, block in enumerate(model.blocks):
        for path in dict.fromkeys(path for path, _ in TARGETS.values()):
            if path.startswith("attn.") or has_plain_mlp(block):
                layers[f"blocks.{i}.{path}"] = block.get_submodule(path)
    return layers


def has_plain_mlp(block: Block) -> bool:
    """Return whether a delta can change the block's MLP: fc1, activation, fc2.

    A gated MLP may call its layers fc1 and fc2 too, but joins them otherwise.
    """
    return type(block.mlp) is Mlp


def parts(name: str, layer: nn.Linear) -> Iterator[tuple[str, slice]]:
    """Yield the targets within a layer and the rows of its output that are theirs.

    `blocks.0.attn.qkv` holds q, k and v, a third each unless the model is pruned; any other layer
    is its own target.
    """
    room, _, leaf = name.rpartition(".")
    if leaf != "qkv":
        yield name, slice(None)
        return
    first = 0
    for target, width in zip("qkv", widths(layer), strict=True):
        yield f"{room}.{target}", slice(first, first + width)
        first += width
