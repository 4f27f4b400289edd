"""The recipe of `tocom-train compare`."""

from typing import Annotated

from pydantic import Field, model_validator

from training.config import BackboneConfig, CropPct, Name
from training.ladders.choice import SHARES, Shares
from training.pictures.config import PicturesConfig
from training.recipe import Recipe


class EntryConfig(Recipe):
    """A method on its usual ladder, or a ladder from a file."""

    method: str | None = Field(None, description="name of a method, on its usual ladder")
    options: dict[str, bool | int | float | str] = Field({}, description="of the method")
    ladder: str | None = Field(None, description="a ladder.json, or a folder that holds one")
    name: str | None = Field(None, description="what tables and plots call a method")

    @model_validator(mode="after")
    def _one(self) -> "EntryConfig":
        if (self.method is None) == (self.ladder is None):
            raise ValueError("give either a method or a ladder")
        if self.ladder is not None and (self.options or self.name):
            raise ValueError("a ladder brings its method, options and name")
        return self


class CompareConfig(Recipe):
    """`tocom-train compare`: methods and ladders side by side on one model."""

    name: Name = Field("compare", description="name of the run and of its folder")
    backbone: BackboneConfig
    task: str | None = Field(
        None, description="a task folder, or bundled:NAME, that was tuned on the backbone"
    )
    model: str | None = Field(None, description="what tables and plots call it")
    pictures: PicturesConfig = Field(description="to measure on: pictures=test.tar")
    limit: int | None = Field(
        None, gt=0, description="so many pictures, spread evenly over the set; default: all"
    )
    labelled: bool = Field(True, description="whether the pictures' classes are the model's")
    entries: tuple[EntryConfig, ...] = Field(
        min_length=1, description="methods and ladders to compare"
    )
    shares: Shares = Field(
        SHARES,
        description="multiply-adds of the rungs of methods, as shares of the stock model's",
    )
    pixels: tuple[Annotated[int, Field(gt=0)], ...] = Field(
        (), description="heights of the smaller pictures that the stock model is shown"
    )
    time_batches: tuple[Annotated[int, Field(gt=0)], ...] = Field(
        (), description="numbers of images whose forwards are timed"
    )
    repeats: int = Field(15, gt=0, description="runs that a median is of")
    threads: int = Field(0, ge=0, description="of timed forwards; 0: as many as there are")
    crop_pct: CropPct = None
    batch_size: int = Field(50, gt=0, description="pictures in one forward")
    workers: int = Field(1, ge=0, description="processes that decode pictures")
