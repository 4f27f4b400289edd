"""The recipe of `tocom-train vtab`."""

from typing import Literal

from pydantic import Field

from training.ladders.choice import LadderChoice
from training.measuring_config import Rate
from training.recipe import Recipe


class TaskConfig(Recipe):
    """A task that is not one of VTAB-1k's."""

    name: str = Field(min_length=1, description="as tables call it")
    folder: str = Field(min_length=1, description="below the root")
    group: Literal["Natural", "Specialized", "Structured"]
    classes: int = Field(gt=0)


class VtabConfig(Recipe):
    """`tocom-train vtab`: fine-tune on each task at each source, measure at each target."""

    name: str = "vtab"
    root: str = Field(min_length=1, description="folder of the tasks' folders")
    tasks: tuple[str | TaskConfig, ...] = Field(
        (), description="folder names of VTAB-1k's tasks, or others described; default: all 19"
    )
    sources: tuple[Rate, ...] = Field((0,), min_length=1)
    targets: tuple[Rate, ...] = Field((0, 4, 8, 12, 16), min_length=1)
    seeds: tuple[int, ...] = Field((0,), min_length=1)
    ladder: LadderChoice = Field(
        None, description="what the rates mean; default: as the fine-tuning's recipe says"
    )
    proportional: bool | None = Field(
        None,
        description="whether merged tokens count in attention by their size; default: as the "
        "fine-tuning's recipe says",
    )
    bank: str | None = Field(None, description="a bank folder, bundled:NAME or a store reference")
    limit: int | None = Field(
        None, gt=0, description="so many test pictures to measure on; default: all"
    )
    recipe: str = Field("vtab1k-adaptformer", description="of the fine-tuning: a file or a preset")
    changes: tuple[str, ...] = Field((), description="key=value changes of that recipe")
    jobs: int = Field(1, gt=0, description="runs at once, which share out processors and GPUs")
