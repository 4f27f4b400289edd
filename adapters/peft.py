"""Deltas as LoRA adapters that stock PEFT loads.

Writes files; no model is built or changed. PEFT itself is an extra and is imported only by who
exports.

Reference: LoRA in PEFT: x -> x Aᵀ Bᵀ · lora_alpha / r beside the layer that it targets.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from adapters.bank import Bank
from adapters.composition import compose
from adapters.durable import new_folder
from adapters.schema import Geometry
from tocom import Delta, LowRank, RateError, TocomError
from tocom.delta import TARGETS


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
    for layer, pair in _by_layer(delta, bank.info.backbone.geometry).items():
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


def _by_layer(delta: Delta, geometry: Geometry) -> dict[str, LowRank]:
    """Return one pair for each of timm's layers; q, k and v are parts of `attn.qkv`."""
    layers: dict[str, list[str]] = {}
    for target, (path, _) in TARGETS.items():
        layers.setdefault(path, []).append(target)
    joined = {}
    for block in range(geometry.depth):
        for path, targets in layers.items():
            room = path.partition(".")[0]
            pairs = [delta.pairs.get(f"blocks.{block}.{room}.{target}") for target in targets]
            widths = [geometry.channels(target, block)[1] for target in targets]
            if any(pairs):
                joined[f"blocks.{block}.{path}"] = _join(pairs, widths)
    return joined


def _join(pairs: Sequence[LowRank | None], widths: Sequence[int]) -> LowRank:
    """Join the pairs of a layer's parts: down [Σ K, in], up [Σ widths, Σ K] in blocks."""
    ups = [
        pair.up if pair else torch.zeros(width, 0)
        for pair, width in zip(pairs, widths, strict=True)
    ]
    up: Tensor = torch.block_diag(*ups)  # type: ignore[no-untyped-call]
    return LowRank(torch.cat([pair.down for pair in pairs if pair]), up)
