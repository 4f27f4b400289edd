"""Models at one rate as files for other runtimes: ONNX, and OpenVINO's IR.

Whatever a rate decides is in the file: how many tokens each block merges, and the weights with
their delta folded in. Who runs it needs nothing of ours. The rate is no input of the file, and
nothing is quantised. The exporters are an extra and are imported only by who exports.
"""

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adapters.bank import Bank, learned_with
from adapters.composition import compose
from adapters.durable import new_files
from adapters.ladder import digest, tuned_on_another
from tocom import (
    Backbone,
    ConfigError,
    FoldedWeights,
    Ladder,
    RateError,
    TocomError,
    Variant,
    fold,
)
from tocom.vit import embed, outputs

#: Suffix -> what writes such a file.
_WRITERS = {".onnx": ("onnx", "onnxscript"), ".xml": ("onnx", "onnxscript", "openvino")}
#: Suffix -> the files that a model may be, the one that is opened last.
_FILES = {".onnx": (".onnx.data", ".onnx"), ".xml": (".bin", ".xml")}


def export_model(
    backbone: Backbone,
    rate: int,
    path: str | Path,
    bank: Bank | None = None,
    source: int | None = None,
    ladder: Ladder | None = None,
) -> Path:
    """Write a model at `rate` as a file that answers as `tocom.forward` does.

    Its input is `images` [B, 3, H, W], normalised as the model wants, for any B; its outputs
    are `logits` [B, classes], which a model without a head lacks, and `features` [B, D], all in
    fp32. The entry `tocom` of its metadata is JSON of what it is and which pictures it wants.

    Args:
        backbone: the model, in fp32 on the CPU; its branches, if a task has any, go with it.
        rate: a rung of the ladder; on the paper's, tokens merged per block.
        path: the new file, whole or not at all: `.onnx`, with `.onnx.data` beside it if it has
            more than 2 GB; or `.xml`, with `.bin` beside it.
        bank: what Δ(source→rate) is composed of, with the multiplier that was searched for the
            model if there is one; None: the model runs without.
        source: rate that the model was tuned at; None: the backbone's own.
        ladder: what the rates mean; None: as the bank says, or else the backbone.

    Raises:
        RateError: if a rate is out of range.
        BankError: if the bank is of another geometry, or for another ladder than the model.
        ReductionError: if the model cannot run the ladder.
        BackboneError: if the model's configuration and its weights want other pictures.
        ConfigError: if the suffix is another, the ladder is neither the bank's nor the model's, or
            its method cannot be in a file.
        TocomError: if a file exists or the extra is not installed.
    """
    path = Path(path)
    _import_writers(path)
    source = backbone.source if source is None else source
    ladder = _ladder(backbone, source, bank, ladder)
    scale, folded = _fold(backbone, source, rate, bank, ladder)
    example = torch.zeros(2, *backbone.input_size)  # of one image, its 1 would be a constant
    used = {"name": bank.info.name, "digest": bank.info.digest, "scale": scale} if bank else None
    about = _describe(backbone) | {"source": source, "rate": rate, "bank": used}
    proportional = bank.info.proportional if bank else backbone.proportional
    learned = learned_with(backbone, bank)
    variant = Variant(rate, folded, backbone.adapter, proportional, ladder, learned)
    about |= {
        "proportional": proportional,
        "method": ladder.method.name,
        "ladder": ladder.name,
        "ladder_digest": digest(ladder),
    }
    with new_files(*(path.with_suffix(suffix) for suffix in _FILES[path.suffix])) as beside:
        graph = (beside / path.name).with_suffix(".onnx")
        _write_onnx(_AtRate(backbone, variant), example, graph, json.dumps(about))
        if path.suffix == ".xml":
            _write_ir(graph, beside / path.name, json.dumps(about))
    return path


class _AtRate(nn.Module):
    """The forward at one rate with its delta: a module that takes images alone."""

    def __init__(self, backbone: Backbone, variant: Variant) -> None:
        super().__init__()
        self.model = backbone.model
        self.variant = variant
        self.names = ("logits", "features") if backbone.model.num_classes else ("features",)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        answer = outputs(self.model, embed(self.model, images), self.variant)
        return tuple(getattr(answer, name) for name in self.names)


def _import_writers(path: Path) -> None:
    """Fail before the work if the file cannot be written at its end."""
    if path.suffix not in _WRITERS:
        raise ConfigError(f"a model is exported as {' or '.join(_WRITERS)}, got {path.name!r}")
    try:
        for name in _WRITERS[path.suffix]:
            import_module(name)
    except ImportError as error:
        raise TocomError(
            f"exporting a model as {path.suffix} wants {error.name}: "
            "pip install 'tocom-serve[export]'"
        ) from error


def _ladder(backbone: Backbone, source: int, bank: Bank | None, asked: Ladder | None) -> Ladder:
    """Return the ladder that the model runs on, by a method that can be in a file."""
    ladder = asked or (bank.ladder if bank else backbone.ladder)
    if bank and digest(ladder) != digest(bank.ladder):
        raise ConfigError(
            f"bank {bank.info.name!r} is for the ladder {bank.ladder.name!r}, not for "
            f"{ladder.name!r}"
        )
    if not bank and (reason := tuned_on_another(backbone, source, ladder)) is not None:
        raise ConfigError(reason)
    ladder.check(backbone.model)
    ladder.check_learned(backbone.model, learned_with(backbone, bank))
    if ladder.method.by_picture:
        raise ConfigError(
            f"the method {ladder.method.name!r} decides by picture how many tokens are left, which "
            "no file can: export a ladder of another method"
        )
    return ladder


def _fold(
    backbone: Backbone, source: int, rate: int, bank: Bank | None, ladder: Ladder
) -> tuple[float | None, FoldedWeights | None]:
    """Return the multiplier of Δ(source→rate) and the weights that have it folded in."""
    if bank is None:
        for what, value in (("source", source), ("target", rate)):
            highest = backbone.max_rate if ladder.top is None else ladder.top
            if not 0 <= value <= highest:
                raise RateError(
                    f"{backbone.name}: the {what} rate must be in 0..{highest}, got {value!r}"
                )
        return None, None
    bank.check_fits(backbone, source)
    scale = bank.multiplier(backbone, source, rate)
    return scale, fold(backbone.model, compose(bank, source, rate, scale))


def _describe(backbone: Backbone) -> dict[str, Any]:
    """Return what is so of the model at any rate."""
    task = {"task_digest": backbone.task_digest} if backbone.task_digest else {}
    return {
        "model": backbone.name,
        "architecture": backbone.architecture,
        "weights_digest": backbone.digest,
        **task,
        **({"multi_label": True} if backbone.multi_label else {}),
        "preprocessing": backbone.data_config,
        "class_names": backbone.class_names,
    }


def _write_onnx(module: _AtRate, example: Tensor, path: Path, about: str) -> None:
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass

    try:
        program = torch.onnx.export(
            module.eval(),
            (example,),
            dynamo=True,
            dynamic_shapes={"images": {0: "batch"}},
            input_names=["images"],
            output_names=module.names,
            verbose=False,
        )
    except torch.onnx.OnnxExporterError as error:
        raise ConfigError(
            f"torch cannot export the method {module.variant.ladder.method.name!r}: "
            f"{str(error).strip().splitlines()[0]}"
        ) from error
    assert program is not None
    # The exporter notes for each node which lines made it: paths of this machine.
    ClearMetadataAndDocStringPass()(program.model)
    program.model.metadata_props["tocom"] = about
    program.save(path)


def _write_ir(graph: Path, path: Path, about: str) -> None:
    # From ONNX, as OpenVINO converts torch itself by a tracer that torch is giving up.
    openvino: Any = import_module("openvino")
    model = openvino.Core().read_model(graph)
    model.set_rt_info(about, ["tocom"])
    openvino.save_model(model, path, compress_to_fp16=False)
