"""Which recipe each command of `tocom-train` takes."""

from training.config import DistillConfig, ElasticConfig, FinetuneConfig
from training.ladders.compare_config import CompareConfig
from training.ladders.search_config import LadderSearchConfig
from training.measuring_config import CalibrateConfig, EvaluateConfig
from training.prune.config import PruneConfig
from training.recipe import Recipe
from training.vtab.config import VtabConfig

KINDS: dict[str, type[Recipe]] = {
    "search": LadderSearchConfig,
    "distill": DistillConfig,
    "elastic": ElasticConfig,
    "finetune": FinetuneConfig,
    "prune": PruneConfig,
    "evaluate": EvaluateConfig,
    "compare": CompareConfig,
    "calibrate": CalibrateConfig,
    "vtab": VtabConfig,
}
