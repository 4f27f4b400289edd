"""The recipe of `tocom-train search`."""

from typing import Annotated

from pydantic import Field, NonNegativeFloat, field_validator, model_validator

from training.config import BackboneConfig, CropPct, Name
from training.pictures.config import PictureSets
from training.recipe import Recipe


class LadderSearchConfig(Recipe):
    """`tocom-train search`: a ladder for a backbone, from pictures without labels."""

    name: Name = Field("ladder", description="name of the ladder and of its run folder")
    backbone: BackboneConfig
    task: str | None = Field(
        None, description="a task folder, or bundled:NAME, that was tuned on the backbone"
    )
    pictures: PictureSets = Field(
        description="pictures=photos.tar; several sets give as many pictures each, as far "
        "as they have them"
    )
    search_on: int = Field(192, gt=0, description="pictures that the search looks at")
    judge_on: int = Field(384, gt=0, description="other pictures, which judge what it found")
    method: str = Field("tome", description="name of the method that the ladder is of")
    options: dict[str, bool | int | float | str] = Field({}, description="of the method")
    try_options: dict[str, tuple[bool | int | float | str, ...]] = Field(
        {}, description="options of the method to search: their values"
    )
    shares: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = Field(
        (0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5),
        min_length=1,
        description="multiply-adds of rungs 1, 2, ... as shares of rung 0's, falling",
    )
    start: str | None = Field(
        None,
        description="a ladder.json of the model: each rung begins with its rung of nearest cost",
    )
    tries: int = Field(300, gt=0, description="changes that are tried for each rung")
    place_cost: NonNegativeFloat | tuple[NonNegativeFloat, ...] = Field(
        0.005,
        description="share of the KL that each block that acts adds to it, for places cost time; "
        "one for all rungs, or one for each",
    )
    seed: int = Field(0, description="what all random draws of the search follow from")
    crop_pct: CropPct = None
    batch_size: int = Field(32, gt=0, description="pictures in one forward")
    workers: int = Field(1, ge=0, description="processes that decode pictures")
    save_every: int = Field(10, gt=0, description="tries between two saves")

    @field_validator("shares")
    @classmethod
    def _falling(cls, shares: tuple[float, ...]) -> tuple[float, ...]:
        if list(shares) != sorted(set(shares), reverse=True):
            raise ValueError("shares must fall from rung to rung")
        return shares

    @model_validator(mode="after")
    def _a_cost_for_each_rung(self) -> "LadderSearchConfig":
        costs = self.place_cost
        if isinstance(costs, tuple) and len(costs) != len(self.shares):
            raise ValueError(
                f"place_cost must be one number or one for each of the {len(self.shares)} shares, "
                f"got {len(costs)}"
            )
        return self
