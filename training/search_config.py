"""The recipe of a search."""

from typing import Annotated

from pydantic import Field, field_validator

from training.config import BackboneConfig, Name, PicturesConfig, Recipe


class SearchConfig(Recipe):
    """A search of one value of the recipe, by accuracy on a part that is not trained on."""

    key: str = Field(description="such as adaptformer.scale or loop.learning_rate")
    values: tuple[float, ...] = Field(description="to try; none: there is no search")
    train: PicturesConfig | None = Field(None, description="to train on while searching")
    validation: PicturesConfig | None = Field(None, description="to measure on while searching")
    share: float = Field(
        0.1, gt=0, lt=1, description="else so much of `pictures`, drawn at random, to measure on"
    )

    @model_validator(mode="after")
    def _both(self) -> "SearchConfig":
        if (self.train is None) != (self.validation is None):
            raise ValueError("a search has both train and validation, or neither")
        return self


class FinetuneConfig(Recipe):
    """`tocom-train finetune`: a model for a labelled task, tuned at one source rate."""

    name: Name
    backbone: BackboneConfig
    pictures: PicturesConfig
    test: PicturesConfig
    classes: int | None = Field(
        None, gt=0, description="of the head; default: those that the pictures have"
    )
    method: Literal["full", "linear", "lora", "adaptformer"] = Field(
        "full", description="what is tuned, beside a new head"
    )
    adaptformer: AdaptFormerConfig = AdaptFormerConfig()
    lora: LoraConfig = LoraConfig()
    search: SearchConfig | None = None
    source: int = Field(0, ge=0, description="rate that the model is tuned at")
    resize: Literal["crop", "squash"] = Field(
        "crop",
        description="what is seen of a picture when measuring and serving: the backbone's own "
        "crop, or all of it, squashed",
    )
    label_smoothing: float = Field(0.1, ge=0, lt=1)
    drop_path: float = Field(0.1, ge=0, lt=1)
    augment: AugmentConfig = AugmentConfig()
    loop: EpochLoopConfig

    @model_validator(mode="after")
    def _can_be_searched(self) -> "FinetuneConfig":
        for value in self.search.values if self.search else ():
            self.candidate(value)
        return self

    def candidate(self, value: float) -> "FinetuneConfig":
        """Return the recipe with a value of its search, which it has no more."""
        assert self.search is not None
        values = self.model_dump(exclude={"search"})
        *path, last = self.search.key.split(".")
        table: Any = values
        for key in path:
            table = table.get(key) if isinstance(table, dict) else None
        if not isinstance(table, dict) or last not in table:
            raise ValueError(f"search.key: the recipe has no {self.search.key}")
        table[last] = value
        return type(self).model_validate(values)


class EvaluateConfig(Recipe):
    """`tocom-train evaluate`: a model at every rate, with and without a bank."""

    name: str = "evaluation"
    backbone: BackboneConfig
    task: str | None = Field(
        None, description="a task folder, or bundled:NAME, that was tuned on the backbone"
    )
    model: str | None = Field(None, description="what tables and plots call it")
    bank: str | None = Field(None, description="a bank folder, bundled:NAME or a store reference")
    pictures: PicturesConfig
    limit: int | None = Field(
        None, gt=0, description="so many pictures, spread evenly over the set; default: all"
    )
    labelled: bool = Field(True, description="whether the pictures' classes are the model's")
    sources: tuple[_Rate, ...] = Field((), description="default: the rate it was tuned at")
    targets: tuple[_Rate, ...] = Field((), description="default: every rate of the bank")
    max_rate: int = Field(16, ge=0, description="highest default target where there is no bank")
    batch_size: int = Field(50, gt=0)
    workers: int = Field(1, ge=0, description="processes that decode pictures")


class CalibrateConfig(Recipe):
    """`tocom-train calibrate`: the multiplier of a bank's deltas for one model."""

    name: str = "calibration"
    backbone: BackboneConfig
    task: str | None = Field(
        None, description="a task folder, or bundled:NAME, that was tuned on the backbone"
    )
    model: str | None = Field(None, description="what the table calls it")
    bank: str = Field(description="a bank folder, bundled:NAME or a store reference")
    pictures: PicturesConfig
    limit: int | None = Field(
        None, gt=0, description="so many pictures, spread evenly over the set; default: all"
    )
    source: _Rate | None = Field(None, description="default: the rate that the model was tuned at")
    targets: tuple[_Rate, ...] = Field(
        (), description="default: every rate of the bank but the source"
    )
    multipliers: tuple[_Multiplier, ...] = Field(
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
    batch_size: int = Field(50, gt=0)
    workers: int = Field(1, ge=0, description="processes that decode pictures")

    @model_validator(mode="after")
    def _smooth(self) -> "CalibrateConfig":
        if self.continuous and self.measure != "kl":
            raise ValueError("a continuous search needs a smooth measure: kl, not top1")
        return self


class SearchConfig(Recipe):
    """`tocom-train search`: a ladder for a backbone, from pictures without labels."""

    name: Name = "ladder"
    backbone: BackboneConfig
    task: str | None = Field(
        None, description="a task folder, or bundled:NAME, that was tuned on the backbone"
    )
    pictures: tuple[PicturesConfig, ...] = Field(
        min_length=1, description="sets that give as many pictures each, as far as they have them"
    )
    search_on: int = Field(192, gt=0, description="pictures that the search looks at")
    judge_on: int = Field(384, gt=0, description="other pictures, which judge what it found")
    method: str = "tome"
    options: dict[str, bool | int | float | str] = Field({}, description="of the method")
    try_options: dict[str, tuple[float, ...]] = Field(
        {}, description="options of the method to search: their values"
    )
    shares: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = Field(
        (0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5),
        min_length=1,
        description="multiply-adds of rungs 1, 2, ... as shares of rung 0's, falling",
    )
    tries: int = Field(300, gt=0, description="changes that are tried for each rung")
    place_cost: float = Field(
        0.005,
        ge=0,
        description="share of the KL that each block that acts adds to it: places cost time",
    )
    seed: int = 0
    batch_size: int = Field(32, gt=0)
    workers: int = Field(1, ge=0, description="processes that decode pictures")
    save_every: int = Field(10, gt=0, description="tries between two saves")

    @field_validator("shares")
    @classmethod
    def _falling(cls, shares: tuple[float, ...]) -> tuple[float, ...]:
        if list(shares) != sorted(set(shares), reverse=True):
            raise ValueError("shares must fall from rung to rung")
        return shares
