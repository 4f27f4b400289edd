"""The recipe of `tocom-train vtab`."""

from typing import Annotated

from pydantic import Field, model_validator

from training.ladders.choice import LadderChoice
from training.measuring_config import Multiplier, Rate
from training.recipe import Recipe


class TaskConfig(Recipe):
    """A task that is not one of VTAB-1k's."""

    name: str = Field(min_length=1, description="as tables call it")
    folder: str = Field(min_length=1, description="below the root")
    group: str = Field(min_length=1, description="whose mean it counts in")
    classes: int = Field(gt=0, description="number of classes of the task")
    pictures: str | None = Field(
        None,
        description="to train on, below the folder: a list (.txt), a .tar, or a folder of class "
        "folders or of .tar files; default: the four lists of VTAB-1k",
    )
    test: str | None = Field(None, description="to test on, likewise")
    train: str | None = Field(
        None,
        description="to train on while a value is searched, likewise; default: `pictures` but for "
        "a part that is drawn at random",
    )
    validation: str | None = Field(None, description="to measure on while a value is searched")
    train_count: int | None = Field(None, gt=0, description="of `pictures`; default: any number")
    test_count: int | None = Field(None, gt=0, description="of `test`; default: any number")

    @model_validator(mode="after")
    def _in_pairs(self) -> "TaskConfig":
        for one, other in (("pictures", "test"), ("train", "validation")):
            if (getattr(self, one) is None) != (getattr(self, other) is None):
                raise ValueError(f"the task {self.name!r} has both {one} and {other}, or neither")
        if self.train is not None and self.pictures is None:
            raise ValueError(f"the task {self.name!r} has train and validation, but no pictures")
        return self


class VtabConfig(Recipe):
    """`tocom-train vtab`: fine-tune on each task at each source, measure at each target."""

    name: str = Field("vtab", description="name of the run and of its folder")
    root: str = Field(min_length=1, description="folder of the tasks' folders")
    tasks: tuple[str | TaskConfig, ...] = Field(
        (), description="folder names of VTAB-1k's tasks, or others described; default: all 19"
    )
    sources: tuple[Rate, ...] = Field((0,), min_length=1, description="rates to tune models at")
    targets: tuple[Rate, ...] = Field(
        (0, 4, 8, 12, 16), min_length=1, description="rates to measure each model at"
    )
    seeds: tuple[Annotated[int, Field(ge=0)], ...] = Field(
        (0,), min_length=1, description="seeds of the fine-tuning; each gives a model of its own"
    )
    ladder: LadderChoice = Field(
        None, description="what the rates mean; default: as the fine-tuning's recipe says"
    )
    proportional: bool | None = Field(
        None,
        description="whether merged tokens count in attention by their size; default: as the "
        "fine-tuning's recipe says",
    )
    bank: str | None = Field(None, description="a bank folder, bundled:NAME or a store reference")
    multipliers: tuple[Multiplier, ...] = Field(
        (),
        description="multipliers of the bank's deltas to try for each model; the best, by KL "
        "divergence on pictures that it was tuned on, is measured beside the bank's own",
    )
    multiplier_pictures: int = Field(
        1000, gt=0, description="on so many of them, spread evenly over the set"
    )
    limit: int | None = Field(
        None, gt=0, description="so many test pictures to measure on; default: all"
    )
    recipe: str = Field("vtab1k-adaptformer", description="of the fine-tuning: a file or a preset")
    changes: tuple[str, ...] = Field((), description="key=value changes of that recipe")
    jobs: int = Field(1, gt=0, description="runs at once, which share out processors and GPUs")
