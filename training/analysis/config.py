"""The recipe of `tocom-train analyse`."""

from typing import Annotated

from pydantic import Field

from training.config import BackboneConfig, CropPct, Name
from training.ladders.choice import SHARES, Shares
from training.ladders.compare_config import EntryConfig
from training.pictures.config import PicturesConfig
from training.recipe import Recipe


class AnalyseConfig(Recipe):
    """`tocom-train analyse`: which tokens methods keep or join, and what it changes."""

    name: Name = Field("analysis", description="name of the run and of its folder")
    backbone: BackboneConfig
    task: str | None = Field(
        None, description="a task folder, or bundled:NAME, that was tuned on the backbone"
    )
    model: str | None = Field(None, description="what tables and plots call it")
    pictures: PicturesConfig = Field(description="to look at: pictures=test.tar")
    limit: int | None = Field(
        500, gt=0, description="so many pictures, spread evenly over the set; more than the models "
        "have channels"
    )  # fmt: skip
    labelled: bool = Field(True, description="whether the pictures' classes are the models'")
    entries: tuple[EntryConfig, ...] = Field(
        min_length=1, description="methods, ladders and banks to look at; some on other models"
    )
    shares: Shares = Field(
        SHARES, description="multiply-adds of the rungs, as shares of the stock model's"
    )
    near: float = Field(
        0.05,
        ge=0,
        lt=1,
        description="methods and models are compared where their shares differ by at most this",
    )
    blocks: tuple[Annotated[int, Field(ge=0)], ...] = Field(
        (),
        description="after which tokens and features are looked at, from 0; default: after each "
        "quarter of them",
    )
    crop_pct: CropPct = None
    batch_size: int = Field(50, gt=0, description="pictures in one forward")
    workers: int = Field(1, ge=0, description="processes that decode pictures")
