"""The forward of a timm model as a graph of OpenVINO, operation by operation.

Building takes 30 ms; tracing and conversion took seconds.

Reference: as in `attention` and `merging`.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import openvino
import torch
from openvino import opset15 as ops
from timm.layers import LayerScale, Mlp
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from tocom.delta import FoldedWeights, parts, target_layers
from tocom.engines.tome import Seen, merge
from tocom.pruned import widths
from tocom.reduction import DTEM, ToMe
from tocom.variant import Variant
from tocom.vit import pools_patches


def weights_of(model: VisionTransformer, delta: FoldedWeights | None) -> dict[str, Tensor]:
    """Return what a delta can change, as it is with this one: q, k and v apart."""
    folded: Mapping[str, Tensor] = {} if delta is None else delta.weights
    weights = {}
    for name, layer in target_layers(model).items():
        weight = folded.get(name, layer.weight)
        for part, rows in parts(name, layer):
            weights[part] = weight[rows]
    return weights


def learned_of(variant: Variant) -> dict[str, Tensor]:
    """Return what the method of a variant has learned, by name, in the order of the inputs."""
    if variant.learned is None or not variant.ladder.method.learns:
        return {}
    return dict(sorted(variant.learned.tensors.items()))


class Builder:
    """Builds the graph of a forward; see `build`."""

    def __init__(
        self, model: VisionTransformer, variant: Variant, images: int, weights: Any
    ) -> None:
        """Prepare inputs: pixels of so many images, and weights of an OpenVINO type."""
        self._model = model
        self._variant = variant
        self._images = images
        self._prefix = model.num_prefix_tokens
        convolution = model.patch_embed.proj
        size = convolution.in_channels, *model.patch_embed.img_size
        self._pixels = ops.parameter([images, *size], openvino.Type.f32)
        self._weights = {
            name: ops.parameter(list(weight.shape), weights)
            for name, weight in weights_of(model, None).items()
        }
        width = model.embed_dim
        self._branches = []
        if variant.adapter is not None:
            bottleneck = variant.adapter.bottleneck
            self._branches = [
                (
                    ops.parameter([bottleneck, width], weights),
                    ops.parameter([width, bottleneck], weights),
                )
                for _ in model.blocks
            ]
        self._learned = {
            name: ops.parameter(list(tensor.shape), weights)
            for name, tensor in learned_of(variant).items()
        }

    def build(self) -> Any:
        """Return the graph from pixels and weights to the tokens after the last block.

        Of these only what the head reads; and their sizes where it needs them.
        """
        model = self._model
        x, size = self._embed(), None
        method = self._variant.ladder.method
        assert isinstance(method, ToMe | DTEM)
        merging = method.merging if isinstance(method, DTEM) else method
        plan = self._variant.plan(model, x.shape[1])
        for i, (block, removed) in enumerate(zip(model.blocks, plan.removed, strict=True)):
            is_last = i == len(model.blocks) - 1
            queries = self._prefix if is_last and not pools_patches(model) else None
            bias = size if self._variant.proportional else None
            y, seen = self._attention(block, f"blocks.{i}.attn", x, bias, queries)
            x = ops.add(self._first(x, queries), self._scaled(block.ls1, y))
            if removed and queries is None:
                x, size = merge(merging, x, size, seen, removed, self._prefix, self._metric(i, x))
            y = self._scaled(
                block.ls2, self._mlp(block.mlp, f"blocks.{i}.mlp", self._norm(block.norm2, x))
            )
            y = ops.add(x, y)
            x = ops.add(y, self._branch(i, x)) if self._branches else y
        results = [x] if size is None or not pools_patches(model) else [x, size]
        inputs = [self._pixels, *self._weights.values()]
        for branch in self._branches:
            inputs += branch
        inputs += self._learned.values()
        return openvino.Model(results, inputs, f"rate {self._variant.rate}")

    def _embed(self) -> Any:
        """All of it that does not depend on the pixels is one constant: what zeros give."""
        model, convolution = self._model, self._model.patch_embed.proj
        with torch.inference_mode():
            pixels = torch.zeros(1, *self._pixels.shape[1:])
            fixed = model._pos_embed(model.patch_embed(pixels))
        weight, stride = _constant(convolution.weight), list(convolution.stride)
        y = ops.convolution(self._pixels, weight, stride, [0, 0], [0, 0], [1, 1])
        y = ops.transpose(ops.reshape(y, [0, 0, -1], True), [0, 2, 1])
        x = ops.add(y, _constant(fixed[:, self._prefix :]))
        if self._prefix:
            front = fixed[:, : self._prefix].expand(self._images, -1, -1)
            x = ops.concat([_constant(front), x], 1)
        return self._norm(model.norm_pre, x)

    def _attention(
        self, block: Block, name: str, x: Any, size: Any, queries: int | None
    ) -> tuple[Any, Seen]:
        """Return the output, and what a merge looks at."""
        attention = block.attn
        heads = attention.num_heads
        x = self._norm(block.norm1, x)
        bias = attention.qkv.bias
        biases = (None, None, None) if bias is None else bias.split(widths(attention.qkv))
        # Three products, as OpenVINO would copy the parts of one.
        q = self._linear(f"{name}.q", self._first(x, queries), biases[0])
        k = self._linear(f"{name}.k", x, biases[1])
        v = self._linear(f"{name}.v", x, biases[2])
        q, k, v = (ops.reshape(t, [0, 0, heads, -1], True) for t in (q, k, v))
        q, k = self._norm(attention.q_norm, q), self._norm(attention.k_norm, k)
        # The mean as a product takes half the time of OpenVINO's own.
        width = widths(attention.qkv)[1] // heads
        mean = _constant(torch.eye(width).repeat(heads, 1) / heads)
        keys = ops.matmul(ops.reshape(k, [0, 0, -1], True), mean, False, False)
        q, k, v = (ops.transpose(t, [0, 2, 1, 3]) for t in (q, k, v))
        log = None if size is None else ops.unsqueeze(ops.log(ops.squeeze(size, [2])), [1, 2])
        # As `look` and timm have it: the fused kernel does not read the layer's own scale.
        scale = attention.head_dim**-0.5 if attention.fused_attn else attention.scale
        y = ops.scaled_dot_product_attention(q, k, v, log, np.float32(scale))
        y = ops.reshape(ops.transpose(y, [0, 2, 1, 3]), [0, 0, -1], True)
        y = self._linear(f"{name}.proj", self._norm(attention.norm, y), attention.proj.bias)
        return y, Seen(keys, q, k, log, scale)

    def _mlp(self, mlp: Mlp, name: str, x: Any) -> Any:
        hidden = ops.gelu(self._linear(f"{name}.fc1", x, mlp.fc1.bias), "erf")
        return self._linear(f"{name}.fc2", self._norm(mlp.norm, hidden), mlp.fc2.bias)

    def _branch(self, block: int, x: Any) -> Any:
        down, up = self._branches[block]
        return _product(ops.relu(_product(x, down)), up)

    def _metric(self, block: int, x: Any) -> Any:
        """Return what was learned to compare; None: nothing was."""
        if not self._learned:
            return None
        bias = ops.convert(self._learned[f"{block}.bias"], openvino.Type.f32)
        return ops.add(_product(x, self._learned[f"{block}.weight"]), bias)

    def _first(self, x: Any, tokens: int | None) -> Any:
        return x if tokens is None else ops.slice(x, [0], [tokens], [1], [1])

    def _linear(self, name: str, x: Any, bias: Tensor | None) -> Any:
        y = _product(x, self._weights[name])
        return y if bias is None else ops.add(y, _constant(bias))

    def _norm(self, norm: nn.Module, x: Any) -> Any:
        if isinstance(norm, nn.Identity):
            return x
        assert isinstance(norm, nn.LayerNorm)
        y = ops.mvn(x, [-1], True, norm.eps, "inside_sqrt")
        y = y if norm.weight is None else ops.multiply(y, _constant(norm.weight))
        return y if norm.bias is None else ops.add(y, _constant(norm.bias))

    def _scaled(self, scale: nn.Module, y: Any) -> Any:
        return ops.multiply(y, _constant(scale.gamma)) if isinstance(scale, LayerScale) else y


def _constant(tensor: Tensor) -> Any:
    return ops.constant(tensor.detach().numpy())


def _product(x: Any, weight: Any) -> Any:
    """Return x weightᵀ, in the precision that the graph is compiled for."""
    return ops.matmul(x, ops.convert(weight, openvino.Type.f32), False, True)
