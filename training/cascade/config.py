"""The recipe of `tocom-train calibrate-cascade`."""

from typing import Annotated

from pydantic import Field, field_validator

from training.config import BackboneConfig, CropPct
from training.ladders.choice import LadderChoice
from training.measuring_config import Rate
from training.pictures.config import PictureSets
from training.recipe import Recipe


class CascadeConfig(Recipe):
    """`tocom-train calibrate-cascade`: how sure a cheap answer of a model must be."""

    name: str = Field("cascade", description="name of the run and of its folder")
    backbone: BackboneConfig
    task: str | None = Field(
        None, description="a task folder, or bundled:NAME, that was tuned on the backbone"
    )
    model: str | None = Field(None, description="what the table calls it")
    bank: str | None = Field(None, description="a bank folder, bundled:NAME or a store reference")
    pictures: PictureSets = Field(
        description="to calibrate on, without labels: such as will be asked about"
    )
    limit: int | None = Field(
        None, gt=0, description="so many pictures, spread evenly over all; default: all"
    )
    ladder: LadderChoice = Field(
        None,
        description="what the rates mean: tome, a ladder.json or a method; default: as the bank "
        "says, or else the model",
    )
    source: Rate | None = Field(None, description="default: the rate that the model was tuned at")
    rates: tuple[Rate, ...] = Field(
        (), description="what runs may be at; default: those of the ladder, of many every few"
    )
    runs: int = Field(3, ge=2, le=4, description="of a picture, at most")
    agreements: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = Field(
        (0.9, 0.92, 0.94, 0.95, 0.96, 0.965, 0.97, 0.975, 0.98, 0.985, 0.99, 0.9925, 0.995, 0.9975),
        min_length=1,
        description="shares of pictures answered as at rate 0, for each of which the cheapest way "
        "is kept",
    )
    crop_pct: CropPct = None
    batch_size: int = Field(50, gt=0, description="pictures in one forward")
    workers: int = Field(1, ge=0, description="processes that decode pictures")

    @field_validator("rates")
    @classmethod
    def _two_with_the_dearest(cls, rates: tuple[int, ...]) -> tuple[int, ...]:
        if rates and (0 not in rates or len(set(rates)) < 2):
            raise ValueError("a cascade needs rate 0, which others are compared to, and a cheaper")
        return tuple(sorted(set(rates), reverse=True))
