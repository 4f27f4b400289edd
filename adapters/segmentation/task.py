"""Tasks of segmentation as folders, and as a value that runs.

A folder has `task.json`, of the kind `segmentation`, and `task.safetensors`: the decoder, and
AdaptFormer's branches if the encoder has them. The encoder's weights are those of the backbone,
shared in memory by all tasks on it.

Reference: Segmenter, arXiv:2105.05633; the rungs of a dense encoder as in ToCom, arXiv:2408.06798,
appendix.
"""

import colorsys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import FailFast, Field, model_validator
from pydantic_core import from_json
from torch import Tensor

from adapters.adaptformer import adapter
from adapters.format import VERSION, Format
from adapters.ladder import Embedded, ladder_of
from adapters.schema import (
    NAME,
    BackboneInfo,
    Count,
    Notes,
    Proportional,
    Strict,
)
from adapters.segmentation.decoder import Decoder, DecoderInfo
from adapters.task import check_tuned_on
from tocom import (
    Backbone,
    BackboneError,
    ShapeError,
    TaskError,
    Variant,
    bundled_folder,
)
from tocom.backbones import BUNDLED
from tocom.dense import check_windows, features, slide

#: Of a palette in a PNG, and of maps that have a byte a pixel.
MAX_CLASSES = 256
#: How many times longer than its shorter side a picture may be: a line has no size to be seen at.
MAX_RATIO = 8

#: Scores that are held at once while those of patches become classes of pixels.
STRIP = 2**22

Channel = Annotated[int, Field(ge=0, le=255)]
Colour = tuple[Channel, Channel, Channel]


class SegmentationInfo(Strict):
    """Everything in `task.json` of a task of segmentation."""

    format_version: Literal[1] = VERSION
    kind: Literal["segmentation"] = "segmentation"
    name: str = Field(pattern=f"^{NAME}$")
    method: Literal["frozen", "adaptformer"] = Field(description="what the encoder has of its own")
    backbone: BackboneInfo = Field(description="the encoder")
    source: int = Field(ge=0, lt=2**31, description="rate that it was tuned at")
    ladder: Embedded | None = Field(
        None,
        exclude_if=lambda ladder: ladder is None,
        description="what that rate means; without it, it is the paper's ladder",
    )
    proportional: Proportional = True
    class_names: Annotated[tuple[str, ...], Field(min_length=1, max_length=MAX_CLASSES), FailFast()]
    palette: Annotated[tuple[Colour, ...], Field(max_length=MAX_CLASSES), FailFast()] = Field(
        description="red, green and blue of each class"
    )
    decoder: DecoderInfo
    rank: Count | None = Field(None, description="width of AdaptFormer's branches")
    scale: float = Field(1.0, gt=0, description="factor of the branches")
    short_side: Count = Field(description="pixels that a picture's shorter side is brought to")
    window: tuple[Count, Count] = Field(description="height and width of what is seen at once")
    stride: tuple[Count, Count] = Field(description="from window to window, where there are more")
    training: Notes = Field({})
    evaluation: Notes | None = None
    digest: str = Field("", description="SHA-256 of the tensors and what gives them meaning")

    @model_validator(mode="after")
    def _fits_together(self) -> "SegmentationInfo":
        ladder = ladder_of(self.ladder, self.backbone.geometry.depth)
        if ladder.top is not None and self.source > ladder.top:
            raise ValueError(
                f"source must be a rung of the ladder {ladder.name!r}, in 0..{ladder.top}, got "
                f"{self.source}"
            )
        if len(self.palette) != len(self.class_names):
            raise ValueError(
                f"the palette has {len(self.palette)} colours for {len(self.class_names)} classes"
            )
        if (self.method == "adaptformer") != (self.rank is not None):
            raise ValueError(f"{self.method} and the rank {self.rank} do not go together")
        check_windows(self.window, self.stride, self.backbone.geometry.patch)
        return self


class SegmentationModel:
    """A task of segmentation in memory.

    Attributes:
        info: what `task.json` says, its digest included.
        ladder: what the rate means that it was tuned at.
        tensors: the decoder's, under `decoder.`; AdaptFormer's `adaptformer.down` [L, K, D] and
            `.up` [L, D, K]. On the CPU, fp32 or fp16.
    """

    def __init__(self, info: SegmentationInfo, tensors: Mapping[str, Tensor]) -> None:
        """Check copies of the tensors against `info` and name the task by its digest.

        Raises:
            TaskError: naming the first tensor that is missing, extra, misshapen or not finite,
                or the entry of `info` that no `task.json` can hold.
        """
        self.info, self.tensors = _FORMAT.own(info, tensors)
        self.ladder = ladder_of(self.info.ladder, self.info.backbone.geometry.depth)

    @classmethod
    def load(cls, folder: str | Path) -> "SegmentationModel":
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

    def on(self, backbone: Backbone) -> "Segmenter":
        """Return the task as a value that runs; its encoder is the backbone's model itself.

        Args:
            backbone: the model that it was tuned on, as it was then.

        Raises:
            TaskError: if it is another one, or cannot have the method of the ladder.
        """
        self.check_fits(backbone)
        info = self.info
        weight = next(backbone.model.parameters())
        tuned = {name: tensor.to(weight) for name, tensor in self.tensors.items()}
        decoder = info.decoder.build(backbone.model.embed_dim, len(info.class_names))
        prefix = "decoder."
        decoder.load_state_dict(
            {
                name.removeprefix(prefix): tensor
                for name, tensor in tuned.items()
                if name.startswith(prefix)
            },
            assign=True,
        )
        branches = None
        if info.method == "adaptformer":
            branches = adapter(tuned["adaptformer.down"], tuned["adaptformer.up"], info.scale)
        encoder = replace(
            backbone,
            name=info.name,
            source=info.source,
            ladder=self.ladder,
            proportional=info.proportional,
            tuned_from=backbone.tuned_from or backbone.digest,
            calibration=None,
            evaluation=info.evaluation,
            adapter=branches,
            task_digest=info.digest,
        )
        return Segmenter(encoder, decoder.eval().requires_grad_(False), info)

    def check_fits(self, backbone: Backbone) -> None:
        """Raise TaskError unless the backbone is the one that it was tuned on."""
        check_tuned_on(self.info.name, self.info.backbone, self.ladder, backbone)

    @property
    def parameters(self) -> int:
        """Number of tuned values."""
        return sum(tensor.numel() for tensor in self.tensors.values())


@dataclass(frozen=True)
class Segmenter:
    """An encoder with a decoder.

    Attributes:
        backbone: the encoder, with the branches, source and ladder of the task.
        decoder: from features [B, D, h, w] to scores [B, K, h, w] of the classes.
        info: what the task says: names and colours of the classes, size and windows.
    """

    backbone: Backbone
    decoder: Decoder
    info: SegmentationInfo

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Return the height and width that a picture is brought to: whole patches.

        Raises:
            ShapeError: if it is empty, or more than `MAX_RATIO` times longer than it is wide.
        """
        short, long = sorted((height, width))
        if short < 1 or long > MAX_RATIO * short:
            raise ShapeError(
                f"a picture to segment has at least one pixel and is at most {MAX_RATIO} times as "
                f"long as its shorter side, got {height} x {width}"
            )
        patch = self.info.backbone.geometry.patch
        scale = self.info.short_side / short
        rows, columns = (
            max(1, round(scale * side / each))
            for side, each in zip((height, width), patch, strict=True)
        )
        return rows * patch[0], columns * patch[1]

    def scores(self, images: Tensor, variant: Variant) -> Tensor:
        """Return the scores [B, K, H / p, W / p] of every class for every patch.

        Args:
            images: [B, 3, H, W], normalised, of a `size`.
            variant: of the encoder; with its branches.
        """
        model = self.backbone.model
        return slide(
            images,
            self.info.window,
            self.info.stride,
            lambda part: self.decoder(features(model, part, variant)),
        )

    def classes(self, scores: Tensor, size: tuple[int, int]) -> Tensor:
        """Return the class [B, H, W] of every pixel, as bytes, from scores of patches.

        Scores are brought to that size as `upsampled` does it, some rows at a time: those of all
        pixels of a photograph, with a number for each class, would take gigabytes.
        """
        height, width = size
        across = upsampled(scores, (scores.shape[2], width))
        last = scores.shape[2] - 1
        places = (torch.arange(height, device=scores.device) + 0.5) * (last + 1) / height - 0.5
        places = places.clamp(0, last)
        above = places.long()
        below, part = (above + 1).clamp(max=last), (places - above).to(scores.dtype)
        found = torch.empty(len(scores), *size, dtype=torch.uint8, device=scores.device)
        rows = max(1, STRIP // across[:, :, 0].numel())
        for start in range(0, height, rows):
            strip = slice(start, start + rows)
            values = torch.lerp(
                across[:, :, above[strip]], across[:, :, below[strip]], part[strip, None]
            )
            found[:, strip] = values.argmax(dim=1)
        return found


def upsampled(scores: Tensor, size: tuple[int, int]) -> Tensor:
    """Return scores [B, K, h, w] of patches for pictures of a size [B, K, H, W], bilinear."""
    return F.interpolate(scores, size=size, mode="bilinear", align_corners=False)


def open_segmentation(reference: str | Path) -> SegmentationModel:
    """Read a task folder, or a bundled one: `bundled:NAME`.

    Raises:
        BackboneError: if nothing bundled has the name.
        TaskError: if the folder is no task of segmentation or a faulty one.
    """
    text = str(reference)
    if text.startswith(BUNDLED):
        return SegmentationModel.load(bundled_folder(text.removeprefix(BUNDLED)))
    return SegmentationModel.load(text)


def is_segmentation(reference: str | Path) -> bool:
    """Return whether a task folder, or a bundled one, says that it is of segmentation.

    Nothing else is checked, nor that it can be read.
    """
    text = str(reference)
    try:
        folder = Path(text)
        if text.startswith(BUNDLED):
            folder = bundled_folder(text.removeprefix(BUNDLED))
        with (folder / _FORMAT.files[0]).open("rb") as file:
            said = from_json(file.read(_FORMAT.max_info_bytes))
    except (BackboneError, OSError, ValueError):
        return False
    return isinstance(said, dict) and said.get("kind") == _FORMAT.kind


def usual_palette(classes: int) -> tuple[Colour, ...]:
    """Return colours for classes that have none, each far from the ones before."""
    # Steps of the golden ratio never come back near to where they were; by turns dark and bright.
    return tuple(
        (round(255 * red), round(255 * green), round(255 * blue))
        for red, green, blue in (
            colorsys.hsv_to_rgb(i * 0.618034 % 1, 0.85 - 0.35 * (i % 2), 0.95 - 0.3 * (i // 2 % 2))
            for i in range(classes)
        )
    )


def tensor_shapes(info: SegmentationInfo) -> dict[str, tuple[int, ...]]:
    """Return the name and shape of every tensor that a task has."""
    geometry = info.backbone.geometry
    with torch.device("meta"):
        decoder = info.decoder.build(geometry.width, len(info.class_names))
    shapes = {f"decoder.{name}": tuple(each.shape) for name, each in decoder.state_dict().items()}
    if info.method == "adaptformer":
        rank = info.rank or 0
        shapes["adaptformer.down"] = (geometry.depth, rank, geometry.width)
        shapes["adaptformer.up"] = (geometry.depth, geometry.width, rank)
    return shapes


_FORMAT = Format(
    what="task",
    files=("task.json", "task.safetensors"),
    info=SegmentationInfo,
    shapes=tensor_shapes,
    covered=(
        "format_version",
        "kind",
        "name",
        "method",
        "source",
        "class_names",
        "palette",
        "decoder",
        "rank",
        "scale",
        "short_side",
        "window",
        "stride",
        "proportional",
    ),
    fault=TaskError,
    max_info_bytes=2**20,
    kind="segmentation",
)
