"""The recipes of `tocom-train evaluate` and `calibrate`."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from training.config import BackboneConfig, CropPct
from training.ladders.choice import LadderChoice
from training.pictures.config import PicturesConfig
from training.recipe import Recipe

Rate = Annotated[int, Field(ge=0)]
Multiplier = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class EvaluateConfig(Recipe):
    """`tocom-train evaluate`: a model at every rate, with and without a bank."""

    name: str = Field("evaluation", description="name of the run and of its folder")
    backbone: BackboneConfig
    task: str | None = Field(
        None, description="a task folder, or bundled:NAME, that was tuned on the backbone"
    )
    model: str | None = Field(None, description="what tables and plots call it")
    bank: str | None = Field(None, description="a bank folder, bundled:NAME or a store reference")
    pictures: PicturesConfig = Field(description="to measure on: pictures=test.tar")
    limit: int | None = Field(
        None, gt=0, description="so many pictures, spread evenly over the set; default: all"
    )
    labelled: bool = Field(True, description="whether the pictures' classes are the model's")
    sources: tuple[Rate, ...] = Field((), description="default: the rate it was tuned at")
    targets: tuple[Rate, ...] = Field((), description="default: every rate of the bank")
    ladder: LadderChoice = Field(
        None,
        description="what the rates mean: tome, a ladder.json or a method; default: as the bank "
        "says, or else the model",
    )
    proportional: bool | None = Field(
        None,
        description="whether merged tokens count in attention by their size; default: as the bank "
        "says, or else the model",
    )
    multiplier: Multiplier | None = Field(
        None,
        description="of the bank's deltas; default: that of the model's calibration for the bank, "
        "else the bank's own",
    )
    max_rate: int = Field(
        16,
        ge=0,
        description="highest default target where neither a bank nor the ladder's rungs say it",
    )
    crop_pct: CropPct = None
    batch_size: int = Field(50, gt=0, description="pictures in one forward")
    workers: int = Field(1, ge=0, description="processes that decode pictures")

    @model_validator(mode="after")
    def _of_a_bank(self) -> "EvaluateConfig":
        if self.multiplier is not None and self.bank is None:
            raise ValueError("a multiplier is of a bank's deltas: give a bank, too")
        return self


class CalibrateConfig(Recipe):
    """`tocom-train calibrate`: the multiplier of a bank's deltas for one model."""

    name: str = Field("calibration", description="name of the run and of its folder")
    backbone: BackboneConfig
    task: str | None = Field(
        None, description="a task folder, or bundled:NAME, that was tuned on the backbone"
    )
    model: str | None = Field(None, description="what the table calls it")
    bank: str = Field(description="a bank folder, bundled:NAME or a store reference")
    pictures: PicturesConfig = Field(description="to measure on: pictures=test.tar")
    limit: int | None = Field(
        None, gt=0, description="so many pictures, spread evenly over the set; default: all"
    )
    source: Rate | None = Field(None, description="default: the rate that the model was tuned at")
    targets: tuple[Rate, ...] = Field(
        (), description="default: every rate of the bank but the source"
    )
    multipliers: tuple[Multiplier, ...] = Field(
        # The paper's search around the multiplier that it trains with.
        (0.05, 0.08, 0.1, 0.12, 0.15),
        min_length=1,
        description="values of the scale to try, beside the bank's own",
    )
    continuous: bool = Field(False, description="then search between the best one's neighbours")
    per_target: bool = Field(False, description="a multiplier for each target, not one for all")
    measure: Literal["kl", "top1"] = Field(
        "kl", description="KL divergence from the source rate, without labels; or top-1"
    )
    crop_pct: CropPct = None
    batch_size: int = Field(50, gt=0, description="pictures in one forward")
    workers: int = Field(1, ge=0, description="processes that decode pictures")

    @model_validator(mode="after")
    def _smooth(self) -> "CalibrateConfig":
        if self.continuous and self.measure != "kl":
            raise ValueError("a continuous search needs a smooth measure: kl, not top1")
        return self
