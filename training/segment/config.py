"""The recipes of `tocom-train segment` and `tocom-train evaluate-segment`."""

from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator
from timm.optim import create_optimizer_v2
from timm.scheduler import PolyLRScheduler
from timm.scheduler.scheduler import Scheduler
from torch import nn
from torch.optim import Optimizer

from adapters.schema import Proportional
from adapters.segmentation.task import Colour, SegmentationInfo
from training.config import AdaptFormerConfig, BackboneConfig, Name
from training.ladders.choice import LadderChoice
from training.loop_config import EpochLoopConfig, LoopConfig
from training.measuring_config import Multiplier, Rate
from training.recipe import Recipe

Pixels = Annotated[int, Field(gt=0)]
Byte = Annotated[int, Field(ge=0, le=255)]


class ScenesConfig(Recipe):
    """Labelled scenes: `SPLIT/images/NAME.jpg` and `SPLIT/labels/NAME.png`."""

    path: str = Field(min_length=1, description="a folder or a .tar")
    classes: int | tuple[str, ...] | None = Field(
        None,
        description="their names, or how many; default: a line each in classes.txt, in the folder "
        "or beside the .tar, or those of the task",
    )
    palette: tuple[Colour, ...] | None = Field(
        None, description="red, green and blue of each class; default: some that differ"
    )
    first: Byte | None = Field(
        None, description="label of the first class, of ADE20k 1; default: 0, or as for the task"
    )
    ignored: tuple[Byte, ...] | None = Field(
        None,
        description="labels of pixels that count nowhere, of ADE20k [0]; default: [255], or as for "
        "the task",
    )

    def of_task(self, info: SegmentationInfo) -> "ScenesConfig":
        """Return it with what it leaves out as the task has it."""
        labels: Any = info.training.get("labels") or {}
        known = {"classes": info.class_names, "palette": info.palette, **labels}
        left_out = {key: value for key, value in known.items() if getattr(self, key) is None}
        return ScenesConfig.model_validate(self.model_dump() | left_out)

    @field_validator("classes")
    @classmethod
    def _some(cls, classes: int | tuple[str, ...] | None) -> int | tuple[str, ...] | None:
        count = len(classes) if isinstance(classes, tuple) else classes
        if count is not None and not 1 <= count <= 255:
            raise ValueError(
                "labels have a byte a pixel, one of which is ignored: 1 to 255 classes"
            )
        return classes


class SceneAugmentConfig(Recipe):
    """What becomes of a scene and its labels in training."""

    short_side: Pixels = Field(512, description="that a picture's shorter side is brought to")
    scale: tuple[float, float] = Field(
        (0.5, 2.0), description="least and largest factor of that, drawn at random"
    )
    crop: tuple[Pixels, Pixels] = Field((512, 512), description="height and width, at random")
    most: float = Field(
        0.75, gt=0, le=1, description="share of a crop that one class should have; ten are tried"
    )
    hflip: float = Field(0.5, ge=0, le=1, description="probability of mirroring left to right")
    distort: bool = Field(
        True, description="change brightness, contrast, saturation and hue, each half of the time"
    )

    @field_validator("scale")
    @classmethod
    def _a_range(cls, scale: tuple[float, float]) -> tuple[float, float]:
        if not 0 < scale[0] <= scale[1]:
            raise ValueError("a scale is from a smallest to a largest factor, above 0")
        return scale


class _Descent(Recipe):
    """How values are learned, and how the learning rate falls."""

    optimizer: Literal["sgd", "adamw"] = Field(
        "sgd", description="SGD as in Segmenter's recipe, with Nesterov's momentum; or AdamW"
    )
    momentum: float = Field(0.9, ge=0, lt=1, description="of SGD")
    power: float = Field(0.9, gt=0, description="of the polynomial by which the rate falls")
    least_rate: float = Field(1e-5, ge=0, description="learning rate at the end")


class SegmentSteps(_Descent, LoopConfig):
    """A run of so many steps."""

    def make_optimizer(self, module: nn.Module) -> Optimizer:
        """Return timm's optimiser of what a module has to learn."""
        optimizer: Optimizer = create_optimizer_v2(
            module, self.optimizer, lr=self.learning_rate, weight_decay=self.weight_decay,
            momentum=self.momentum,
        )  # fmt: skip
        return optimizer

    def make_scheduler(self, optimizer: Optimizer) -> Scheduler:
        """Return timm's polynomial schedule."""
        return PolyLRScheduler(
            optimizer, t_initial=self.steps, power=self.power, lr_min=self.least_rate,
            warmup_t=self.warmup_steps, t_in_epochs=False,
        )  # fmt: skip


class SegmentLoop(_Descent, EpochLoopConfig):
    """A run of so many passes over its scenes."""

    run: ClassVar[Callable[..., LoopConfig]] = SegmentSteps


class SegmentConfig(Recipe):
    """`tocom-train segment`: a decoder, and what the encoder needs for it."""

    name: Name = Field("segmenter", description="name of the task and of its run folder")
    backbone: BackboneConfig
    scenes: ScenesConfig
    train: str = Field("train", description="split to learn from, a folder in the data")
    test: str = Field("test", description="split to test on, once, when all is done")
    unseen: str | None = Field(None, description="split that is watched while training")
    watched: int = Field(50, gt=0, description="so many of its scenes")
    method: Literal["frozen", "adaptformer", "full"] = Field(
        "frozen", description="what is tuned of the encoder, beside a new decoder"
    )
    adaptformer: AdaptFormerConfig = AdaptFormerConfig()
    decoder: Literal["mask", "linear"] = Field("mask", description="Segmenter's")
    layers: int = Field(2, ge=0, le=100, description="blocks of a Mask Transformer")
    width: int | None = Field(None, gt=0, description="its channels; default: the encoder's")
    heads: int | None = Field(None, gt=0, description="its heads; default: one for 64 channels")
    dropout: float = Field(0.1, ge=0, lt=1, description="in its blocks")
    drop_path: float = Field(
        0.1, ge=0, lt=1, description="stochastic depth of an encoder that is tuned"
    )
    source: int = Field(0, ge=0, description="rate that it is tuned at")
    ladder: LadderChoice = Field(
        None,
        description="what the source rate means: tome, the paper's (default); a ladder.json, a "
        "bank, a method",
    )
    proportional: Proportional = True
    augment: SceneAugmentConfig = SceneAugmentConfig()
    stride: tuple[Pixels, Pixels] | None = Field(
        None,
        description="from window to window over a larger picture, when testing and serving; "
        "windows are of the size of crops; default: side by side",
    )
    loop: SegmentLoop

    @model_validator(mode="after")
    def _can_learn(self) -> "SegmentConfig":
        if self.loop.compile:
            raise ValueError("loop.compile is not for segmentation")
        return self


class EvaluateSegmentConfig(Recipe):
    """`tocom-train evaluate-segment`: a segmenter at every rung, with and without a bank."""

    name: str = Field("evaluation", description="name of the run and of its folder")
    backbone: BackboneConfig
    task: str = Field(description="a folder that segment made, or bundled:NAME")
    scenes: ScenesConfig
    test: str = Field("test", description="split to measure on")
    limit: int | None = Field(
        None, gt=0, description="so many scenes, spread evenly over the split; default: all"
    )
    bank: str | None = Field(None, description="a bank folder, bundled:NAME or a store reference")
    ladder: LadderChoice = Field(
        None, description="what the rates mean; default: as the bank says, or else the task"
    )
    targets: tuple[Rate, ...] = Field((), description="default: every rate of the ladder")
    max_rate: int = Field(
        16, ge=0, description="highest default target where no rungs of a ladder say it"
    )
    multiplier: Multiplier | None = Field(
        None, description="of the bank's deltas; default: the bank's own"
    )
    batch_size: int = Field(8, gt=0, description="pictures in one forward")
    workers: int = Field(1, ge=0, description="processes that decode pictures")
    save_every: int = Field(10, gt=0, description="batches between two saves")

    @model_validator(mode="after")
    def _of_a_bank(self) -> "EvaluateSegmentConfig":
        if self.multiplier is not None and self.bank is None:
            raise ValueError("a multiplier is of a bank's deltas: give a bank, too")
        return self
