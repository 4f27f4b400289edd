"""Banks from the checkpoints of ToCom's reference implementation.

Reads files as tensors only: no code in them runs, and no model is built.
"""

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from pydantic import ValidationError
from torch import Tensor

from adapters.bank import Bank, BankInfo
from adapters.format import parse_tensors
from adapters.schema import BackboneInfo, first_fault
from tocom import BankError

#: Rates of the reference, whose checkpoints do not say it.
REFERENCE_MAX_RATE = 16
_TENSOR = re.compile(
    r"(?:(?:module|model|plugin)\.)*(blocks\.\d+\.attn\.[qv]_tocom\.adapter_(?:down|up)\.weight)"
)


def import_reference(
    path: str | Path,
    name: str,
    backbone: BackboneInfo,
    max_rate: int | None = None,
    rank: int | None = None,
    scale: float = 0.1,
) -> Bank:
    """Read the plug-ins out of a checkpoint of the reference implementation.

    Its tensors are `blocks.{i}.attn.{q,v}_tocom.adapter_{down,up}.weight`, down [R k, D] and up
    [D, R k], step i→i+1 in components R k - k (i + 1) ... R k - k i. Other tensors in the file
    are left alone, as are the prefixes `module.`, `model.` and `plugin.`.

    Args:
        path: a `.safetensors` file, or what the reference writes with `torch.save`, which is
            read as tensors only: no code in it runs.
        name: the bank's name from now on.
        backbone: what it was distilled for; the checkpoint does not say.
        max_rate: R; by default what `rank` leaves, or 16 as in the reference.
        rank: k; by default what `max_rate` leaves.
        scale: the multiplier s, which is not in the checkpoint either.

    Raises:
        BankError: if the file cannot be read or does not hold such plug-ins.
    """
    path = Path(path)
    found = _plugins(path)
    depth, width = backbone.geometry.depth, backbone.geometry.width
    stacks = {}
    for layer in (f"blocks.{i}.attn.{target}" for i in range(depth) for target in "qv"):
        for leaf, factor in (("down", "A"), ("up", "B")):
            key = f"{layer}_tocom.adapter_{leaf}.weight"
            if key not in found:
                raise BankError(f"{path} lacks {key}, which {backbone.architecture} needs")
            # Both factors as [components, channels].
            stacks[f"{layer}.{factor}"] = found[key] if factor == "A" else found[key].T
    if extra := len(found) - len(stacks):
        raise BankError(f"{path} has {extra} tensors for more than the {depth} blocks there are")

    components = len(stacks["blocks.0.attn.q.A"])
    max_rate, rank = _divide(components, max_rate, rank)
    tensors = {}
    for key, stack in stacks.items():
        if tuple(stack.shape) != (components, width):
            raise BankError(
                f"{path}: {key} must have {components} components of {width} channels, "
                f"got {' x '.join(map(str, stack.shape))}"
            )
        steps = stack.float().reshape(max_rate, rank, width).flip(0)  # the last ones come first
        tensors[key] = steps if key.endswith("A") else steps.transpose(1, 2)
    try:
        info = BankInfo(
            name=name,
            backbone=backbone,
            max_rate=max_rate,
            rank=rank,
            targets=("q", "v"),
            scale=scale,
            training={"imported_from": path.name},
        )
    except ValidationError as error:
        raise BankError(f"the bank's {first_fault(error)}") from error
    return Bank(info, tensors)


def _plugins(path: Path) -> dict[str, Tensor]:
    """Return the plug-in tensors of a checkpoint by their names without prefixes."""
    found: dict[str, Tensor] = {}
    for key, tensor in _read(path).items():
        if match := _TENSOR.fullmatch(key):
            if match[1] in found:
                raise BankError(f"{path} holds {match[1]} twice, under two prefixes")
            if tensor.ndim != 2:
                raise BankError(f"{path}: {match[1]} must be a matrix, got {list(tensor.shape)}")
            found[match[1]] = tensor
    if not found:
        raise BankError(
            f"{path} holds no plug-ins: nothing in it is called "
            "blocks.0.attn.q_tocom.adapter_down.weight"
        )
    return found


def _read(path: Path) -> Mapping[str, Tensor]:
    if not path.is_file():
        raise BankError(f"there is no checkpoint {path}")
    if path.suffix == ".safetensors":
        return parse_tensors(path.read_bytes(), path, BankError)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling raises whatever the bytes lead to
        raise BankError(
            f"{path} cannot be read as tensors only ({type(error).__name__}). If it is whole and "
            "you trust it, convert it: safetensors.torch.save_file("
            "torch.load(path, weights_only=False)['model'], 'plugins.safetensors')"
        ) from error
    # The reference saves {"model": {name: tensor}}.
    tensors = content.get("model", content) if isinstance(content, dict) else content
    if not isinstance(tensors, dict) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in tensors.items()
    ):
        raise BankError(f"{path} holds no tensors by name, neither at its top nor under 'model'")
    return tensors


def _divide(components: int, max_rate: int | None, rank: int | None) -> tuple[int, int]:
    """Return (R, k) with R k components."""
    if max_rate is None:
        max_rate = REFERENCE_MAX_RATE if rank is None else components // max(rank, 1)
    if rank is None:
        rank = components // max(max_rate, 1)
    if max_rate < 1 or rank < 1 or max_rate * rank != components:
        raise BankError(
            f"the plug-ins have {components} components, which is not {max_rate} steps of rank "
            f"{rank}: say the right max_rate or rank"
        )
    return max_rate, rank
