"""Graphs for CPUs, compiled by OpenVINO.

`builder` makes them from timm's modules. Which models they can run is decided by `unsupported`.
They give the answers of `vit.outputs` but for rounding. OpenVINO is an extra: import this module,
which nothing else of the package does, only where it is wanted.
"""

import functools
import weakref
from collections.abc import Sequence
from typing import Any

import openvino
import torch
from timm.layers import Mlp
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from tocom.adapter import Adapter
from tocom.delta import AnyDelta, Delta, FoldedWeights
from tocom.engines.builder import Builder, learned_of, weights_of
from tocom.engines.layers import Bounds, Int8, Ranges, Watched, WeightInputs
from tocom.reduction import DTEM, Method, ReductionWeights, ToMe
from tocom.variant import Variant
from tocom.vit import Outputs, read

#: What graphs compute in.
_TYPES = {torch.float32: openvino.Type.f32, torch.bfloat16: openvino.Type.bf16}


def unsupported(model: VisionTransformer, method: Method | None = None) -> str | None:
    """Return why a model has no graphs of a method, by default of any; None if it has."""
    if method is not None and not isinstance(method, ToMe | DTEM):
        return f"there are no graphs of the method {method.name!r}"
    weight = model.patch_embed.proj.weight
    if weight.device.type != "cpu" or weight.dtype != torch.float32:
        return "graphs are for fp32 on a CPU"
    if model.dynamic_img_size:
        return "its pictures may be of any size"
    if not isinstance(model.patch_embed.norm, nn.Identity):
        return "its patches are normed before their positions are added"
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
        ranges: Ranges | None = None,
    ) -> None:
        """Compile, which takes a second at most.

        Args:
            model: one that is not `unsupported`. Weights that a delta can change are not copied,
                unless they are converted.
            variant: what it is for. Weights are its inputs: it runs with any other delta, any
                other adapter of the same bottleneck, and whatever else its method has learned.
            images: how many it takes at once.
            threads: how many run it; 0: OpenVINO's own choice.
            dtype: what it computes in, torch.bfloat16 or torch.float32.
            ranges: what its linear layers read, as `measure` returns it: they run in int8 then.
                Their weights are its own, and it is for the delta of `variant` alone.
        """
        self._model = model
        self._dtype = dtype
        self._has_weights = ranges is not None
        streams = _streams(images, threads)
        options = {
            # Said in either case: where a CPU has bf16, the default would be that.
            "INFERENCE_PRECISION_HINT": _TYPES[dtype],
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": streams,
        }
        self._share = images // streams
        weights = _weights(model, variant.delta)
        layers = WeightInputs(weights, _TYPES[dtype]) if ranges is None else Int8(weights, ranges)
        graph = Builder(model, variant, self._share, layers, _TYPES[dtype]).build()
        self._compiled = _core().compile_model(graph, "CPU", options)
        self._requests = [self._compiled.create_infer_request() for _ in range(streams)]
        self._bound: _Bound | None = None

    def __call__(self, images: Tensor, variant: Variant) -> Outputs:
        """Return features and logits; one torch thread is enough for its part in that.

        Args:
            images: [B, 3, H, W], as many as it was made for.
            variant: the one that it was made for, or another that differs in weights alone.
        """
        self._bind(variant)
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

    def _bind(self, variant: Variant) -> None:
        """Point the graph at the weights of a call, unless it was the last one's."""
        if self._bound is not None and self._bound.is_of(variant):
            return
        delta = variant.delta
        assert not isinstance(delta, Delta)  # a graph's weights are folded
        tensors = [] if self._has_weights else list(weights_of(self._model, delta).values())
        tensors = [tensor.detach().to(self._dtype).contiguous() for tensor in tensors]
        tensors += _beside(variant, self._dtype)
        for index, tensor in enumerate(tensors, start=1):
            for request in self._requests:
                request.set_input_tensor(index, _shared(tensor))
        self._bound = _Bound(delta, variant.adapter, variant.learned, tensors)


def measure(
    model: VisionTransformer, variant: Variant, batches: Sequence[Tensor], threads: int = 0
) -> Ranges:
    """Return what linear layers read of pictures: bounds, means over the batches.

    Means, as the extremes of all are those of single values, for which all others would be
    rounded to longer steps.

    Args:
        model: one that is not `unsupported`.
        variant: as it will run.
        batches: of images [B, 3, H, W], all of one size; 64 images are enough.
        threads: how many run it; 0: OpenVINO's own choice.
    """
    watched = Watched(_weights(model, variant.delta))
    builder = Builder(model, variant, len(batches[0]), watched, openvino.Type.f32)
    graph = openvino.Model(watched.results, builder.build().get_parameters(), "ranges")
    options = {"INFERENCE_PRECISION_HINT": openvino.Type.f32, "INFERENCE_NUM_THREADS": threads}
    request = _core().compile_model(graph, "CPU", options).create_infer_request()
    beside = [_shared(tensor) for tensor in _beside(variant, torch.float32)]
    seen = []
    for batch in batches:
        request.infer([_shared(batch.contiguous()), *beside])
        count = len(watched.results)
        seen.append([float(request.get_output_tensor(i).data) for i in range(count)])
    means = torch.tensor(seen, dtype=torch.float64).mean(0).view(-1, 2).tolist()
    return {name: Bounds(*each) for name, each in zip(watched.names, means, strict=True)}


def _weights(model: VisionTransformer, delta: AnyDelta | None) -> dict[str, Tensor]:
    assert not isinstance(delta, Delta)
    return weights_of(model, delta)


def _beside(variant: Variant, dtype: torch.dtype) -> list[Tensor]:
    """Return weights that are inputs of every graph: an adapter's, and learned ones."""
    branches = variant.adapter.branches if variant.adapter is not None else ()
    tensors = [tensor for branch in branches for tensor in branch]
    tensors += learned_of(variant).values()
    return [tensor.detach().to(dtype).contiguous() for tensor in tensors]


class _Bound:
    """Weights that a graph points at: kept alive for it, but no longer than their delta is."""

    def __init__(
        self,
        delta: FoldedWeights | None,
        adapter: Adapter | None,
        learned: ReductionWeights | None,
        tensors: list[Tensor],
    ) -> None:
        # Of a bank that is no longer served, nothing is left here. Nothing runs on it then, and
        # the next call binds others.
        self._delta = None if delta is None else weakref.ref(delta, lambda _: tensors.clear())
        self._adapter, self._learned = adapter, learned
        self._tensors = tensors

    def is_of(self, variant: Variant) -> bool:
        """Return whether they are those of a call."""
        bound = None if self._delta is None else self._delta()
        beside = self._adapter is variant.adapter and self._learned is variant.learned
        return bound is variant.delta and beside and bool(self._tensors)


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


def _shared(tensor: Tensor) -> Any:
    """Return OpenVINO's view of a contiguous tensor's memory."""
    if tensor.dtype == torch.float32:
        return openvino.Tensor(tensor.numpy(), shared_memory=True)
    # numpy knows no bf16: its bits go by another name.
    bits = tensor.view(torch.int16).numpy()
    return openvino.Tensor(bits, openvino.Shape(list(tensor.shape)), _TYPES[tensor.dtype])
