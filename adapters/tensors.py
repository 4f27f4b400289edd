"""Folders of a description and named tensors: strict to read, and named by their content."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from tocom import TocomError

_DTYPES = (torch.float32, torch.float16)


def read_files(
    folder: Path, names: Sequence[str], what: str, fault: type[TocomError]
) -> list[bytes]:
    """Return the contents of the files that make a folder `what`; raise `fault` if it is none."""
    try:
        return [(folder / name).read_bytes() for name in names]
    except (FileNotFoundError, NotADirectoryError) as error:
        missing = Path(error.filename).name
        raise fault(f"{folder} is no {what}: it has no {missing}") from None
    except OSError as error:
        raise fault(f"{folder} cannot be read: {error}") from error


def parse_tensors(content: bytes, file: Path, fault: type[TocomError]) -> dict[str, Tensor]:
    """Read the tensors of a safetensors file from its content; raise `fault` if it has any."""
    try:
        return load(content)
    except KeyError as error:
        raise fault(f"{file} holds a tensor of the unknown type {error}") from error
    except SafetensorError as error:
        raise fault(f"{file} is truncated or corrupted: {error}") from error


def check_tensors(
    what: str,
    tensors: Mapping[str, Tensor],
    shapes: Mapping[str, Sequence[int]],
    fault: type[TocomError],
) -> None:
    """Raise `fault` unless the tensors have these names and shapes, one precision and values.

    Args:
        what: whose they are, for messages.
        tensors: fp32 or fp16.
        shapes: of all that there must be.
        fault: the error; it names the first tensor that is missing, extra, misshapen, not finite.
    """
    for lacks, names in (
        ("lacks", shapes.keys() - tensors.keys()),
        ("has an unknown", tensors.keys() - shapes.keys()),
    ):
        if names:
            raise fault(f"{what} {lacks} tensor {sorted(names)[0]}")
    dtypes = {tensor.dtype for tensor in tensors.values()}
    if len(dtypes) > 1 or not dtypes <= set(_DTYPES):
        raise fault(f"{what} must be all fp32 or all fp16, got {sorted(map(str, dtypes))}")
    for name, shape in shapes.items():
        if tuple(tensors[name].shape) != tuple(shape):
            raise fault(f"{what}: {name} must be {list(shape)}, got {list(tensors[name].shape)}")
        if not torch.isfinite(tensors[name]).all():
            raise fault(f"{what}: {name} holds NaN or infinity")


def content_digest(meaning: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """Return SHA-256 of tensors on the CPU and of what gives them meaning."""
    digest = hashlib.sha256(json.dumps(meaning, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()
