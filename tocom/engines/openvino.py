"""Graphs for CPUs, compiled by OpenVINO.

The graph is built operation by operation from timm's modules: that takes 30 ms, tracing and
conversion took seconds. Which models it can run is decided by `unsupported`. It gives the answers
of `vit.outputs` but for rounding. OpenVINO is an extra and is imported only here.

Reference: as in `attention` and `merging`.
"""

import functools
import weakref
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import openvino
import torch
from openvino import opset15 as ops
from timm.layers import LayerScale, Mlp
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from tocom.adapter import Adapter
from tocom.delta import AnyDelta, Delta, FoldedWeights, parts, target_layers
from tocom.reduction import Method, ToMe
from tocom.variant import Variant
from tocom.vit import Outputs, pools_patches, read

#: What graphs compute in.
_TYPES = {torch.float32: openvino.Type.f32, torch.bfloat16: openvino.Type.bf16}

#: The end of a slice that goes up to the last element.
_END = np.array([np.iinfo(np.int32).max], np.int32)


def unsupported(model: VisionTransformer, method: Method | None = None) -> str | None:
    """Return why a model has no graphs of a method, by default of any; None if it has."""
    if method is not None and not isinstance(method, ToMe):
        return f"there are no graphs of the method {method.name!r}"
    weight = model.patch_embed.proj.weight
    if weight.device.type != "cpu" or weight.dtype != torch.float32:
        return "graphs are for fp32 on a CPU"
    if model.dynamic_img_size:
        return "its pictures may be of any size"
    for block in model.blocks:
        if type(block.mlp) is not Mlp:
            return "its MLPs are not two layers and an activation"
        if not isinstance(block.mlp.act, nn.GELU) or block.mlp.act.approximate != "none":
            return "its activation is not GELU"
    for name, module in model.named_modules():
        if "norm" in name and not isinstance(module, nn.LayerNorm | nn.Identity):
            return f"its {name} is not LayerNorm"
    return None


class Graph:
    """The forward of a model at one rate for a number of images, compiled.

    Not for several threads at once.
    """

    def __init__(
        self,
        model: VisionTransformer,
        variant: Variant,
        images: int,
        threads: int = 0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Compile, which takes a second at most.

        Args:
            model: one that is not `unsupported`. Weights that a delta can change are not copied,
                unless they are converted.
            variant: what it is for. Weights are its inputs: it runs with any other delta, and
                with any other adapter of the same bottleneck.
            images: how many it takes at once.
            threads: how many run it; 0: OpenVINO's own choice.
            dtype: what it computes in, torch.bfloat16 or torch.float32.
        """
        self._model = model
        self._dtype = dtype
        streams = _streams(images, threads)
        options = {
            # Said in either case: where a CPU has bf16, the default would be that.
            "INFERENCE_PRECISION_HINT": _TYPES[dtype],
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": streams,
        }
        self._share = images // streams
        graph = _Builder(model, variant, self._share, _TYPES[dtype]).build()
        self._compiled = _core().compile_model(graph, "CPU", options)
        self._requests = [self._compiled.create_infer_request() for _ in range(streams)]
        self._bound: _Bound | None = None

    def __call__(self, images: Tensor, variant: Variant) -> Outputs:
        """Return features and logits; one torch thread is enough for its part in that.

        Args:
            images: [B, 3, H, W], as many as it was made for.
            variant: the one that it was made for, or another that differs in weights alone.
        """
        self._bind(variant.delta, variant.adapter)
        shares = torch.split(images.contiguous(), self._share)
        for request, share in zip(self._requests, shares, strict=True):
            request.set_input_tensor(0, _shared(share))
            request.start_async()
        for request in self._requests:
            request.wait()
        x, *size = map(self._output, range(len(self._compiled.outputs)))
        return read(self._model, x, size[0] if size else None)

    def _output(self, index: int) -> Tensor:
        """Return an output of all images."""
        tensors = (request.get_output_tensor(index) for request in self._requests)
        return torch.cat([torch.from_numpy(tensor.data) for tensor in tensors])

    def _bind(self, delta: AnyDelta | None, adapter: Adapter | None) -> None:
        """Point the graph at the weights of a call, unless it was the last one's."""
        if self._bound is not None and self._bound.is_of(delta, adapter):
            return
        assert not isinstance(delta, Delta)  # a graph's weights are folded
        tensors = list(_weights(self._model, delta).values())
        for branch in adapter.branches if adapter is not None else ():
            tensors += branch
        tensors = [tensor.detach().to(self._dtype).contiguous() for tensor in tensors]
        for index, tensor in enumerate(tensors, start=1):
            for request in self._requests:
                request.set_input_tensor(index, _shared(tensor))
        self._bound = _Bound(delta, adapter, tensors)


class _Bound:
    """Weights that a graph points at: kept alive for it, but no longer than their delta is."""

    def __init__(
        self, delta: FoldedWeights | None, adapter: Adapter | None, tensors: list[Tensor]
    ) -> None:
        # Of a bank that is no longer served, nothing is left here. Nothing runs on it then, and
        # the next call binds others.
        self._delta = None if delta is None else weakref.ref(delta, lambda _: tensors.clear())
        self._adapter = adapter
        self._tensors = tensors

    def is_of(self, delta: AnyDelta | None, adapter: Adapter | None) -> bool:
        """Return whether they are those of a call."""
        bound = None if self._delta is None else self._delta()
        return bound is delta and self._adapter is adapter and bool(self._tensors)


def _streams(images: int, threads: int) -> int:
    """Return in how many equal shares the images are run, side by side.

    Threads that run one share together wait for each other in every layer, and beside a busy
    program for the one that has lost its core. So each gets a share of its own if it can.
    """
    streams = 1
    while 2 * streams <= threads and images % (2 * streams) == 0:
        streams *= 2
    return streams


@functools.cache
def _core() -> Any:
    """Return the process's one core, which stays.

    A core gives the thread that loads its CPU plugin another stack for signals, and at its end the
    one before, which may have gone with another core: the next Ctrl-C would crash.
    """
    return openvino.Core()


def _weights(model: VisionTransformer, delta: FoldedWeights | None) -> dict[str, Tensor]:
    """Return what a delta can change, as it is with this one: q, k and v apart."""
    folded: Mapping[str, Tensor] = {} if delta is None else delta.weights
    weights = {}
    for name, layer in target_layers(model).items():
        weight = folded.get(name, layer.weight)
        for part, rows in parts(name, layer.out_features):
            weights[part] = weight[rows]
    return weights


def _shared(tensor: Tensor) -> Any:
    """Return OpenVINO's view of a contiguous tensor's memory."""
    if tensor.dtype == torch.float32:
        return openvino.Tensor(tensor.numpy(), shared_memory=True)
    # numpy knows no bf16: its bits go by another name.
    bits = tensor.view(torch.int16).numpy()
    return openvino.Tensor(bits, openvino.Shape(list(tensor.shape)), _TYPES[tensor.dtype])


def _constant(tensor: Tensor) -> Any:
    return ops.constant(tensor.detach().numpy())


def _product(x: Any, weight: Any) -> Any:
    """Return x weightᵀ, in the precision that the graph is compiled for."""
    return ops.matmul(x, ops.convert(weight, openvino.Type.f32), False, True)


class _Seen(NamedTuple):
    """What a merge looks at."""

    keys: Any  # [B, N, D / H] the mean of the keys over the heads
    q: Any  # [B, H, N, D / H]
    k: Any  # [B, H, N, D / H]
    log: Any  # [B, 1, 1, N] log sizes; None: all count alike
    scale: float


class _Builder:
    """Builds the graph of a forward."""

    def __init__(
        self, model: VisionTransformer, variant: Variant, images: int, weights: Any
    ) -> None:
        self._model = model
        self._variant = variant
        self._images = images
        self._prefix = model.num_prefix_tokens
        convolution = model.patch_embed.proj
        size = convolution.in_channels, *model.patch_embed.img_size
        self._pixels = ops.parameter([images, *size], openvino.Type.f32)
        self._weights = {
            name: ops.parameter(list(weight.shape), weights)
            for name, weight in _weights(model, None).items()
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

    def build(self) -> Any:
        """Return the graph from pixels and weights to the tokens after the last block.

        Of these only what the head reads; and their sizes where it needs them.
        """
        model = self._model
        x, size = self._embed(), None
        method = self._variant.ladder.method
        assert isinstance(method, ToMe)
        plan = self._variant.plan(model, x.shape[1])
        for i, (block, removed) in enumerate(zip(model.blocks, plan.removed, strict=True)):
            is_last = i == len(model.blocks) - 1
            queries = self._prefix if is_last and not pools_patches(model) else None
            bias = size if self._variant.proportional else None
            y, seen = self._attention(block, f"blocks.{i}.attn", x, bias, queries)
            x = ops.add(self._first(x, queries), self._scaled(block.ls1, y))
            if removed and queries is None:
                x, size = self._merge(method, x, size, seen, removed)
            y = self._scaled(
                block.ls2, self._mlp(block.mlp, f"blocks.{i}.mlp", self._norm(block.norm2, x))
            )
            y = ops.add(x, y)
            x = ops.add(y, self._branch(i, x)) if self._branches else y
        results = [x] if size is None or not pools_patches(model) else [x, size]
        inputs = [self._pixels, *self._weights.values()]
        for branch in self._branches:
            inputs += branch
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
    ) -> tuple[Any, "_Seen"]:
        """Return the output, and what a merge looks at."""
        attention = block.attn
        heads, width = attention.num_heads, attention.head_dim
        x = self._norm(block.norm1, x)
        bias = attention.qkv.bias
        biases = (None, None, None) if bias is None else bias.chunk(3)
        # Three products, as OpenVINO would copy the parts of one.
        q = self._linear(f"{name}.q", self._first(x, queries), biases[0])
        k = self._linear(f"{name}.k", x, biases[1])
        v = self._linear(f"{name}.v", x, biases[2])
        q, k, v = (ops.reshape(t, [0, 0, heads, width], True) for t in (q, k, v))
        q, k = self._norm(attention.q_norm, q), self._norm(attention.k_norm, k)
        # The mean as a product takes half the time of OpenVINO's own.
        mean = _constant(torch.eye(width).repeat(heads, 1) / heads)
        keys = ops.matmul(ops.reshape(k, [0, 0, heads * width], True), mean, False, False)
        q, k, v = (ops.transpose(t, [0, 2, 1, 3]) for t in (q, k, v))
        log = None if size is None else ops.unsqueeze(ops.log(ops.squeeze(size, [2])), [1, 2])
        # As `attend` and timm have it: the fused kernel does not read the layer's own scale.
        scale = width**-0.5 if attention.fused_attn else attention.scale
        y = ops.scaled_dot_product_attention(q, k, v, log, np.float32(scale))
        y = ops.reshape(ops.transpose(y, [0, 2, 1, 3]), [0, 0, heads * width], True)
        y = self._linear(f"{name}.proj", self._norm(attention.norm, y), attention.proj.bias)
        return y, _Seen(keys, q, k, log, scale)

    def _mlp(self, mlp: Mlp, name: str, x: Any) -> Any:
        hidden = ops.gelu(self._linear(f"{name}.fc1", x, mlp.fc1.bias), "erf")
        return self._linear(f"{name}.fc2", self._norm(mlp.norm, hidden), mlp.fc2.bias)

    def _branch(self, block: int, x: Any) -> Any:
        down, up = self._branches[block]
        return _product(ops.relu(_product(x, down)), up)

    def _class_attention(self, seen: "_Seen") -> Any:
        """Return the attention of the class token [B, N, 1], mean over the heads, times N."""
        first = ops.slice(seen.q, [0], [1], [1], [2])  # [B, H, 1, d]
        first = ops.multiply(first, np.float32(seen.scale))
        scores = ops.matmul(first, seen.k, False, True)
        scores = scores if seen.log is None else ops.add(scores, seen.log)
        share = ops.reduce_mean(ops.softmax(scores, -1), [1], False)  # [B, 1, N]
        share = ops.multiply(share, np.float32(share.shape[2]))
        return ops.transpose(ops.maximum(share, np.float32(1e-12)), [0, 2, 1])

    def _penalty(self, method: ToMe, attention: Any, size: Any) -> Any:
        """Return what `ToMe` takes off similarities for each token [B, N, 1]; None: nothing."""
        penalty = None
        if method.importance:
            penalty = ops.multiply(ops.log(attention), np.float32(method.importance))
        if method.size and size is not None:
            sizes = ops.multiply(ops.log(size), np.float32(method.size))
            penalty = sizes if penalty is None else ops.add(penalty, sizes)
        return penalty

    def _merge(
        self, method: ToMe, x: Any, size: Any, seen: "_Seen", removed: int
    ) -> tuple[Any, Any]:
        """Match and merge as `ToMe` does; only tokens of set B can change."""
        attention = self._class_attention(seen) if method.needs_class else None
        penalty = self._penalty(method, attention, size)
        metric = x if method.metric == "tokens" else seen.keys
        length = ops.maximum(ops.reduce_l2(metric, [2], True), np.float32(1e-12))
        metric = ops.divide(metric, length)
        scores = ops.matmul(self._a(metric), self._b(metric), False, True)
        if penalty is not None:
            scores = ops.subtract(scores, self._a(penalty))
            scores = ops.subtract(scores, ops.transpose(self._b(penalty), [0, 2, 1]))
        top = ops.topk(scores, 1, -1, "max", "none")
        best, partner = top.outputs()  # [B, A, 1]
        order = ops.topk(best, best.shape[1], 1, "max", "value").output(1)
        chosen = ops.slice(order, [0], [removed], [1], [1])
        rest = ops.slice(order, [removed], _END, [1], [1])
        if self._prefix:  # in their order; without a prefix as they are, as `match` has it
            rest = ops.topk(rest, rest.shape[1], 1, "min", "value").output(0)
        if size is None:
            size = ops.constant(np.ones((*x.shape[:2], 1), np.float32))

        into = ops.gather_elements(partner, chosen, 1)  # [B, r, 1]
        size_b = self._sums(size, chosen, into)
        by_class = method.weight == "class"
        weight = attention if by_class else size
        moved_weight = ops.gather_elements(self._a(weight), chosen, 1)
        moved = ops.multiply(self._rows(self._a(x), chosen), moved_weight)
        x_b = ops.multiply(self._b(x), self._b(weight))
        x_b = ops.scatter_elements_update(x_b, ops.broadcast(into, moved.shape), moved, 1, "sum")
        whole = self._sums(weight, chosen, into) if by_class else size_b
        tokens = [self._rows(self._a(x), rest), ops.divide(x_b, whole)]
        sizes = [ops.gather_elements(self._a(size), rest, 1), size_b]
        if self._prefix:
            tokens.insert(0, self._first(x, self._prefix))
            sizes.insert(0, self._first(size, self._prefix))
        return ops.concat(tokens, 1), ops.concat(sizes, 1)

    def _sums(self, x: Any, chosen: Any, into: Any) -> Any:
        """Return what set B has of x [B, N, 1] when the chosen of A joined it."""
        moved = ops.gather_elements(self._a(x), chosen, 1)
        return ops.scatter_elements_update(self._b(x), into, moved, 1, "sum")

    def _a(self, x: Any) -> Any:
        """Return the tokens of set A, those at even positions, without prefix tokens."""
        return ops.slice(x, [self._prefix + self._prefix % 2], _END, [2], [1])

    def _b(self, x: Any) -> Any:
        """Return the tokens of set B, those at odd positions, without prefix tokens."""
        return ops.slice(x, [self._prefix + 1 - self._prefix % 2], _END, [2], [1])

    def _first(self, x: Any, tokens: int | None) -> Any:
        return x if tokens is None else ops.slice(x, [0], [tokens], [1], [1])

    def _rows(self, x: Any, index: Any) -> Any:
        """Return the tokens of x [B, N, D] at index [B, r, 1]."""
        return ops.gather(x, ops.squeeze(index, [2]), 1, 1)

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
