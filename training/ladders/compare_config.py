"""The recipe of `tocom-train compare`, and how methods to compare are named."""

from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BeforeValidator, Field, model_validator

from training.config import BackboneConfig, CropPct, Name
from training.ladders.choice import SHARES, Shares
from training.pictures.config import PicturesConfig
from training.recipe import Recipe


def _several(value: Any) -> Any:
    return [value] if isinstance(value, str | dict) else value


#: One, or several that were made alike with other seeds.
Names: TypeAlias = Annotated[tuple[str, ...], BeforeValidator(_several)]
Backbones: TypeAlias = Annotated[tuple[BackboneConfig, ...], BeforeValidator(_several)]


class EntryConfig(Recipe):
    """A method on its usual ladder, a ladder from a file, a bank, or a model tuned for one."""

    method: str | None = Field(None, description="name of a method, on its usual ladder")
    options: dict[str, bool | int | float | str] = Field({}, description="of the method")
    ladder: str | None = Field(None, description="a ladder.json, or a folder that holds one")
    bank: Names = Field(
        (), description="measured beside plain, on its ladder; several: of different seeds"
    )
    backbone: Backbones = Field(
        (), description="a model of its own; default: the recipe's; several: of different seeds"
    )
    task: Names = Field(
        (), description="a task of its own; default: the recipe's; several: of different seeds"
    )
    name: str | None = Field(None, description="what tables and plots call it")

    @property
    def runs(self) -> int:
        """How many seeds it has."""
        return max(1, len(self.bank), len(self.backbone), len(self.task))

    @property
    def own_model(self) -> bool:
        """Whether it runs on another model than the recipe's."""
        return bool(self.backbone or self.task)

    @model_validator(mode="after")
    def _one(self) -> "EntryConfig":
        given = sum(bool(each) for each in (self.method, self.ladder, self.bank))
        if given > 1 or not (given or self.own_model):
            raise ValueError(
                "give either a method or a ladder or a bank; a task or a backbone alone stands for "
                "the ladder that it was tuned on"
            )
        if self.options and self.method is None:
            raise ValueError("a ladder brings its method and options")
        return self

    @model_validator(mode="after")
    def _as_many(self) -> "EntryConfig":
        for key in ("bank", "backbone", "task"):
            if (count := len(getattr(self, key))) not in (0, 1, self.runs):
                raise ValueError(
                    f"of several seeds each of bank, backbone and task is one or {self.runs}, got "
                    f"{count} of {key}"
                )
        return self


class CompareConfig(Recipe):
    """`tocom-train compare`: methods, ladders and banks side by side."""

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
        min_length=1, description="methods, ladders and banks to compare"
    )
    shares: Shares = Field(
        SHARES,
        description="multiply-adds of the rungs of methods, as shares of the stock model's; for "
        "each of them the best entry is named",
    )
    judge: Literal["kl", "agreement", "top1"] = Field(
        "kl", description="by which figure an entry is the best"
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

    @model_validator(mode="after")
    def _judged_by_labels(self) -> "CompareConfig":
        if self.judge == "top1" and not self.labelled:
            raise ValueError("judge=top1 needs labelled=true")
        return self
