"""Which recipe each command of `tocom-train` takes."""

from training.config import (
    CalibrateConfig,
    DistillConfig,
    EvaluateConfig,
    FinetuneConfig,
    VtabConfig,
)
from training.ladders.compare_config import CompareConfig
from training.ladders.search_config import LadderSearchConfig
from training.recipe import Recipe

KINDS: dict[str, type[Recipe]] = {
    "search": LadderSearchConfig,
    "distill": DistillConfig,
    "finetune": FinetuneConfig,
    "evaluate": EvaluateConfig,
    "compare": CompareConfig,
    "calibrate": CalibrateConfig,
    "vtab": VtabConfig,
}
