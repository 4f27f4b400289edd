"""Task models: what was tuned of a backbone for a task, and the head.

Format 1 is a folder with `task.json` and `task.safetensors`; nothing in it is executable. It
holds only what was tuned: AdaptFormer's branches, LoRA's pairs, or the head alone, and the
weights of the method of its ladder, if that is learned. The
backbone's weights are shared by all tasks on it, but for the layers that LoRA changes. Which
bank it is served with is not known here.
"""

import copy
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import FailFast, Field, model_validator
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from adapters.adaptformer import adapter
from adapters.format import VERSION, Format
from adapters.ladder import Embedded, ladder_of, learned_in, learned_shapes
from adapters.schema import (
    NAME,
    BackboneInfo,
    Count,
    Geometry,
    Notes,
    Proportional,
    Strict,
)
from tocom import (
    Adapter,
    Backbone,
    Ladder,
    ReductionError,
    ReductionWeights,
    TaskError,
    bundled_folder,
)
from tocom.backbones import BUNDLED
from tocom.delta import TARGETS

#: timm's layers that LoRA may change.
LAYERS = tuple(dict.fromkeys(path for path, _ in TARGETS.values()))


class TaskInfo(Strict):
    """Everything in `task.json`."""

    format_version: Literal[1] = VERSION
    name: str = Field(pattern=f"^{NAME}$")
    method: Literal["adaptformer", "lora", "linear"]
    backbone: BackboneInfo = Field(description="the model that it was tuned on")
    source: int = Field(ge=0, lt=2**31, description="rate that it was tuned at")
    ladder: Embedded | None = Field(
        None,
        exclude_if=lambda ladder: ladder is None,
        description="what that rate means; without it, it is the paper's ladder",
    )
    proportional: Proportional = True
    multi_label: bool = Field(
        False,
        exclude_if=lambda many: not many,
        description="whether a picture has several classes, each scored by itself; without it, one",
    )
    class_names: Annotated[tuple[str, ...], Field(min_length=1), FailFast()]
    heads: tuple[str, ...] = Field(("head",), min_length=1, description="timm's layers of them")
    rank: Count | None = Field(None, description="width of the branches or of LoRA's pairs")
    layers: tuple[str, ...] = Field((), description="timm's layers in a block that LoRA changes")
    scale: float = Field(1.0, gt=0, description="factor of what was tuned")
    resize: Literal["crop", "squash"] = Field(
        "crop", description="what becomes of a picture: the backbone's own crop, or all of it"
    )
    crop_pct: Annotated[float, Field(gt=0, le=1)] | None = Field(
        None,
        exclude_if=lambda crop: crop is None,
        description="share of a picture's shorter side that the crop sees; without it, the "
        "backbone's own",
    )
    training: Notes = Field({})
    evaluation: Notes | None = None
    calibration: Notes | None = None
    digest: str = Field("", description="SHA-256 of the tensors and what gives them meaning")

    @model_validator(mode="after")
    def _of_its_ladder(self) -> "TaskInfo":
        ladder = ladder_of(self.ladder, self.backbone.geometry.depth)
        if ladder.top is not None and self.source > ladder.top:
            raise ValueError(
                f"source must be a rung of the ladder {ladder.name!r}, in 0..{ladder.top}, got "
                f"{self.source}"
            )
        return self

    @model_validator(mode="after")
    def _seen_in_one_way(self) -> "TaskInfo":
        data_config(self.resize, self.crop_pct)
        return self


class TaskModel:
    """A task model in memory.

    Attributes:
        info: what `task.json` says, its digest included.
        ladder: what the rate means that it was tuned at.
        tensors: `head.weight` [C, D] and `head.bias` [C]; AdaptFormer's `adaptformer.down`
            [L, K, D] and `.up` [L, D, K]; LoRA's `lora.blocks.{i}.attn.qkv.A` [K, in] and `.B`
            [out, K]; those of a learned method, `reduction.{i}...`. On the CPU, fp32 or fp16.
    """

    def __init__(self, info: TaskInfo, tensors: Mapping[str, Tensor]) -> None:
        """Check copies of the tensors against `info` and name the task by its digest.

        Raises:
            TaskError: naming the first tensor that is missing, extra, misshapen or not finite,
                or the entry of `info` that no `task.json` can hold.
        """
        what = f"task {info.name!r}"
        if (info.method == "linear") != (info.rank is None):
            raise TaskError(f"{what}: {info.method} and the rank {info.rank} do not go together")
        if (info.method == "lora") != bool(info.layers) or not set(info.layers) <= set(LAYERS):
            raise TaskError(
                f"{what}: the layers that LoRA changes are some of {', '.join(LAYERS)}; "
                f"{info.method} cannot have {', '.join(info.layers) or 'none'}"
            )
        self.info, self.tensors = _FORMAT.own(info, tensors)
        self.ladder = ladder_of(self.info.ladder, self.info.backbone.geometry.depth)

    @classmethod
    def load(cls, folder: str | Path) -> "TaskModel":
        """Read a task folder.

        Raises:
            TaskError: if anything about it is wrong; the message names the fault.
        """
        return cls(*_FORMAT.parse(*_FORMAT.read(Path(folder)), Path(folder)))

    def save(self, folder: str | Path) -> Path:
        """Write the task as the new folder `folder`, whole or not at all.

        Raises:
            TaskError: if `folder` exists; a written task is never changed.
        """
        return _FORMAT.save(Path(folder), self.info, self.tensors)

    def on(self, backbone: Backbone) -> Backbone:
        """Return the task as a model that runs; it shares the backbone's weights in memory.

        Args:
            backbone: the model that it was tuned on, as it was then.

        Raises:
            TaskError: if it is another one, has other heads, or cannot have the method of the
                ladder.
        """
        self.check_fits(backbone)
        info = self.info
        if sorted(info.heads) != sorted(own := heads_of(backbone.model)):
            raise TaskError(
                f"task {info.name!r}: the heads of {backbone.name} are {', '.join(own)}, got "
                f"{', '.join(info.heads):.200}"
            )
        model = share(backbone.model)
        model.reset_classifier(len(info.class_names))
        weight: Any = backbone.model.blocks[0].attn.qkv.weight
        tuned = {name: tensor.to(weight) for name, tensor in self.tensors.items()}
        for head in info.heads:
            layer: Any = model.get_submodule(head)
            layer.weight = nn.Parameter(tuned[f"{head}.weight"], requires_grad=False)
            layer.bias = nn.Parameter(tuned[f"{head}.bias"], requires_grad=False)
        for name in self._changed_layers():
            changed: Any = model.get_submodule(name)
            up, down = tuned[f"lora.{name}.B"], tuned[f"lora.{name}.A"]
            merged = changed.weight.detach() + info.scale * (up @ down)
            changed.weight = nn.Parameter(merged, requires_grad=False)
        model.pretrained_cfg |= data_config(info.resize, info.crop_pct)
        return replace(
            backbone,
            model=model.eval(),
            name=info.name,
            class_names=info.class_names,
            source=info.source,
            ladder=self.ladder,
            proportional=info.proportional,
            tuned_from=backbone.tuned_from or backbone.digest,
            calibration=info.calibration,
            evaluation=info.evaluation,
            adapter=self._adapter(tuned),
            learned=self._learned(tuned),
            multi_label=info.multi_label,
            task_digest=info.digest,
        )

    def check_fits(self, backbone: Backbone) -> None:
        """Raise TaskError unless the backbone is the one that it was tuned on."""
        check_tuned_on(self.info.name, self.info.backbone, self.ladder, backbone)

    @property
    def parameters(self) -> int:
        """Number of tuned values."""
        return sum(tensor.numel() for tensor in self.tensors.values())

    def _adapter(self, tuned: Mapping[str, Tensor]) -> Adapter | None:
        if self.info.method != "adaptformer":
            return None
        return adapter(tuned["adaptformer.down"], tuned["adaptformer.up"], self.info.scale)

    def _learned(self, tuned: Mapping[str, Tensor]) -> ReductionWeights | None:
        return learned_in(tuned, self.ladder) if self.ladder.method.learns else None

    def _changed_layers(self) -> list[str]:
        depth = self.info.backbone.geometry.depth
        return [f"blocks.{i}.{layer}" for i in range(depth) for layer in self.info.layers]


def open_task(reference: str | Path) -> TaskModel:
    """Read a task folder, or a bundled one: `bundled:NAME`.

    Raises:
        BackboneError: if nothing bundled has the name.
        TaskError: if the folder is no task model or a faulty one.
    """
    text = str(reference)
    if text.startswith(BUNDLED):
        return TaskModel.load(bundled_folder(text.removeprefix(BUNDLED)))
    return TaskModel.load(text)


def tensor_shapes(info: TaskInfo) -> dict[str, tuple[int, ...]]:
    """Return the name and shape of every tensor that a task has."""
    geometry, classes, rank = info.backbone.geometry, len(info.class_names), info.rank or 0
    shapes: dict[str, tuple[int, ...]] = {}
    for head in info.heads:
        shapes |= {f"{head}.weight": (classes, geometry.width), f"{head}.bias": (classes,)}
    if info.method == "adaptformer":
        shapes["adaptformer.down"] = (geometry.depth, rank, geometry.width)
        shapes["adaptformer.up"] = (geometry.depth, geometry.width, rank)
    for layer in info.layers:
        for i in range(geometry.depth):
            inputs, outputs = geometry.channels(layer.rpartition(".")[2], i)
            shapes[f"lora.blocks.{i}.{layer}.A"] = (rank, inputs)
            shapes[f"lora.blocks.{i}.{layer}.B"] = (outputs, rank)
    return shapes | learned_shapes(ladder_of(info.ladder, geometry.depth), geometry)


def data_config(resize: Literal["crop", "squash"], crop_pct: float | None) -> dict[str, Any]:
    """Return what differs from the backbone's own treatment of pictures, in timm's words.

    Args:
        resize: what becomes of a picture.
        crop_pct: share of its shorter side that a crop sees; None: the backbone's own.

    Raises:
        ValueError: if a share is given where all of the picture is seen.
    """
    if resize == "squash":
        if crop_pct is not None:
            raise ValueError(
                f"crop_pct is for resize='crop'; 'squash' shows all of a picture, got {crop_pct:g}"
            )
        return {"crop_pct": 1.0, "crop_mode": "squash"}
    return {} if crop_pct is None else {"crop_pct": crop_pct, "crop_mode": "center"}


def share(model: VisionTransformer) -> VisionTransformer:
    """Return a copy of a model's structure whose weights are the model's own."""
    weights: dict[int, Any] = {id(each): each for each in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, weights)


def heads_of(model: VisionTransformer) -> tuple[str, ...]:
    """Return the names of a model's heads: two, if it was distilled from a teacher."""
    return ("head", "head_dist") if hasattr(model, "head_dist") else ("head",)


_FORMAT = Format(
    what="task",
    files=("task.json", "task.safetensors"),
    info=TaskInfo,
    shapes=tensor_shapes,
    covered=(
        "format_version",
        "name",
        "method",
        "source",
        "class_names",
        "heads",
        "rank",
        "layers",
        "scale",
        "resize",
        "crop_pct",
        "proportional",
        "multi_label",
    ),
    fault=TaskError,
    max_info_bytes=2**24,  # the class names of ImageNet-21k alone have close to a megabyte
)


def check_tuned_on(name: str, own: BackboneInfo, ladder: Ladder, backbone: Backbone) -> None:
    """Raise TaskError unless a backbone is the one that a task was tuned on, and has its ladder.

    Args:
        name: of the task.
        own: the backbone that it was tuned on.
        ladder: the one that it was tuned on.
        backbone: that it is to be put on.
    """
    if own.geometry != Geometry.of(backbone.model) or own.digest != backbone.digest:
        raise TaskError(
            f"task {name!r} was tuned on {own.architecture} with the weights {own.digest[:12]}; "
            f"{backbone.name} is {backbone.architecture} with the weights {backbone.digest[:12]}"
        )
    try:
        ladder.check(backbone.model)
    except ReductionError as error:
        raise TaskError(f"task {name!r} does not fit {backbone.name}: {error}") from error
