"""Deltas for PEFT, and banks from the reference implementation's checkpoints.

Writes and reads files; no model is built or changed. PEFT itself is an extra and is
imported only by who exports.

Reference: LoRA in PEFT: x -> x Aᵀ Bᵀ · lora_alpha / r beside the layer that it targets.
"""

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from adapters.bank import Bank, BankInfo
from adapters.compose import compose
from adapters.durable import new_folder
from adapters.geometry import BackboneInfo, first_fault
from tocom import BankError, Delta, LowRank, RateError, TocomError
from tocom.delta import TARGETS, parts

#: Rates of the reference, whose checkpoints do not say it.
REFERENCE_MAX_RATE = 16
_REFERENCE_TENSOR = re.compile(
    r"(?:(?:module|model|plugin)\.)*(blocks\.\d+\.attn\.[qv]_tocom\.adapter_(?:down|up)\.weight)"
)


def export_peft(bank: Bank, source: int, target: int, folder: str | Path) -> Path:
    """Write Δ(source→target) as a LoRA that stock PEFT loads onto the timm model.

    `PeftModel.from_pretrained(model, folder)` then answers as `tocom.forward` with that delta
    at rate 0. The parts of timm's fused `attn.qkv` become one pair: their A stacked, their B
    in blocks. lora_alpha equals r, so PEFT's scaling is 1; ours is in B.

    Args:
        bank: the bank.
        source: rate that the model was tuned at.
        target: rate that it will run at; another than `source`.
        folder: the new folder, whole or not at all.

    Raises:
        RateError: if a rate is out of the bank's range or both are the same.
        BankError: if `folder` exists.
        TocomError: if PEFT is not installed.
    """
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise TocomError("exporting wants PEFT: pip install 'tocom-serve[peft]'") from error
    delta = compose(bank, source, target)
    if not delta.pairs:
        raise RateError(f"source and target are both {source}: there is no delta to export")

    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    for layer, pair in _by_layer(delta).items():
        tensors[f"base_model.model.{layer}.lora_A.weight"] = pair.down
        tensors[f"base_model.model.{layer}.lora_B.weight"] = pair.up
        ranks[".".join(layer.split(".")[2:])] = len(pair.down)
    most = max(ranks.values())
    fewer = {path: rank for path, rank in ranks.items() if rank < most}
    config = LoraConfig(
        base_model_name_or_path=bank.info.backbone.architecture,
        target_modules=list(ranks),
        r=most,
        lora_alpha=most,
        rank_pattern=fewer,
        alpha_pattern=fewer,
        inference_mode=True,
    )
    with new_folder(Path(folder)) as beside:
        config.save_pretrained(str(beside))
        # The name under which PEFT looks, and the format entry that its own files have.
        save_file(tensors, beside / "adapter_model.safetensors", metadata={"format": "pt"})
    return Path(folder)


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
    found = _reference_tensors(path)
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


def _by_layer(delta: Delta) -> dict[str, LowRank]:
    """Return one pair for each of timm's layers; q, k and v are thirds of `attn.qkv`."""
    outputs = {}
    for name, pair in delta.pairs.items():
        block, _, target = name.rsplit(".", 2)
        path, third = TARGETS[target]
        outputs[f"{block}.{path}"] = len(pair.up) * (1 if third is None else 3)
    return {layer: _join(delta, layer, channels) for layer, channels in outputs.items()}


def _join(delta: Delta, layer: str, outputs: int) -> LowRank:
    """Join the pairs of a layer's parts: down [Σ K, in], up [outputs, Σ K] in blocks."""
    shared = [
        (rows, delta.pairs[part]) for part, rows in parts(layer, outputs) if part in delta.pairs
    ]
    down = torch.cat([pair.down for _, pair in shared])
    up = down.new_zeros(outputs, len(down))
    first = 0
    for rows, pair in shared:
        up[rows, first : first + len(pair.down)] = pair.up
        first += len(pair.down)
    return LowRank(down, up)


def _reference_tensors(path: Path) -> dict[str, Tensor]:
    """Return the plug-in tensors of a checkpoint by their names without prefixes."""
    found: dict[str, Tensor] = {}
    for key, tensor in _read(path).items():
        if match := _REFERENCE_TENSOR.fullmatch(key):
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
        try:
            return load_file(path)
        except (KeyError, SafetensorError) as error:
            raise BankError(f"{path} is truncated or corrupted: {error}") from error
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
