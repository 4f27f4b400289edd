"""Products of a graph with the weights of linear layers: as its inputs, or in int8.

In int8, weights are rounded to 255 steps, each row of [out, in] by its own greatest value, and
what a layer reads to 256 steps between two bounds, which are measured on pictures and are one
value each for all tokens and channels. OpenVINO runs such a product in whole numbers. All else
stays fp32, above all what decides which tokens merge: similarities are of unrounded values.

Reference: Jacob et al., "Quantization and Training of Neural Networks for Efficient
Integer-Arithmetic-Only Inference", CVPR 2018, section 2; weights by row as in Krishnamoorthi,
"Quantizing deep convolutional networks for efficient inference", 2018.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeAlias

import numpy as np
import openvino
import torch
from openvino import opset15 as ops
from torch import Tensor

#: Steps of what a layer reads; of its weights as many but one, so that they are symmetric.
_STEPS = 256


class Bounds(NamedTuple):
    """The least and the greatest value that a layer reads."""

    low: float
    high: float


#: Of every layer, by its name.
Ranges: TypeAlias = Mapping[str, Bounds]


class Layers(Protocol):
    """What a graph does with its linear layers.

    Attributes:
        inputs: of the graph, that this needs beside pixels.
    """

    inputs: Sequence[Any]

    def __call__(self, name: str, x: Any) -> Any:
        """Return x [..., in] times the weight [out, in] of a layer."""


class WeightInputs:
    """The weights are inputs of the graph, which therefore runs with any."""

    def __init__(self, weights: Mapping[str, Tensor], dtype: Any) -> None:
        """Prepare inputs for weights of these shapes, of an OpenVINO type."""
        self._weights = {
            name: ops.parameter(list(weight.shape), dtype) for name, weight in weights.items()
        }
        self.inputs: Sequence[Any] = list(self._weights.values())

    def __call__(self, name: str, x: Any) -> Any:
        """See `Layers`."""
        return product(x, self._weights[name])


class Int8:
    """The weights are constants of the graph, in int8."""

    inputs: Sequence[Any] = ()

    def __init__(self, weights: Mapping[str, Tensor], ranges: Ranges) -> None:
        """Take weights [out, in], and what the layers read."""
        self._weights = weights
        self._ranges = ranges
        self._rounded: dict[str, Any] = {}

    def __call__(self, name: str, x: Any) -> Any:
        """See `Layers`."""
        source = x.get_friendly_name()
        if source not in self._rounded:  # q, k and v read the same
            self._rounded[source] = _rounded(x, self._ranges[name])
        weight = self._weights[name].detach()
        step = weight.abs().amax(1, keepdim=True).clamp(min=torch.finfo().tiny) / (_STEPS // 2 - 1)
        steps = ops.constant((weight / step).round().to(torch.int8).numpy())
        weight = ops.multiply(ops.convert(steps, openvino.Type.f32), ops.constant(step.numpy()))
        return ops.matmul(self._rounded[source], weight, False, True)


class Watched:
    """The weights are constants in fp32, and what the layers read is watched.

    Attributes:
        results: the least and the greatest value that each layer of `names` reads, by turns.
    """

    inputs: Sequence[Any] = ()

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        """Take weights [out, in]."""
        self._weights = weights
        self.names: list[str] = []
        self.results: list[Any] = []

    def __call__(self, name: str, x: Any) -> Any:
        """See `Layers`."""
        axes = list(range(len(x.shape)))
        self.names.append(name)
        self.results += [ops.reduce_min(x, axes), ops.reduce_max(x, axes)]
        return product(x, ops.constant(self._weights[name].detach().contiguous().numpy()))


def product(x: Any, weight: Any) -> Any:
    """Return x weightᵀ, in the precision that the graph is compiled for."""
    return ops.matmul(x, ops.convert(weight, openvino.Type.f32), False, True)


def _rounded(x: Any, bounds: Bounds) -> Any:
    """Return x in steps between bounds, one of which is zero itself."""
    low, high = min(bounds.low, 0.0), max(bounds.high, 0.0)
    step = (high - low) / (_STEPS - 1) or 1.0
    below = round(-low / step)
    ends = [np.float32(-below * step), np.float32((_STEPS - 1 - below) * step)]
    constants = [ops.constant(end) for end in ends]
    return ops.fake_quantize(x, *constants, *constants, _STEPS)
