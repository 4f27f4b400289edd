"""Which recipe each command of `tocom-train` takes."""

from training.analysis.config import AnalyseConfig
from training.cascade.config import CascadeConfig
from training.config import DistillConfig, ElasticConfig, FinetuneConfig
from training.ladders.compare_config import CompareConfig
from training.ladders.search_config import LadderSearchConfig
from training.measuring_config import CalibrateConfig, EvaluateConfig
from training.prune.config import PruneConfig
from training.recipe import Recipe
from training.segment.config import EvaluateSegmentConfig, SegmentConfig
from training.vtab.config import VtabConfig

KINDS: dict[str, type[Recipe]] = {
    "search": LadderSearchConfig,
    "distill": DistillConfig,
    "elastic": ElasticConfig,
    "finetune": FinetuneConfig,
    "prune": PruneConfig,
    "segment": SegmentConfig,
    "evaluate": EvaluateConfig,
    "evaluate-segment": EvaluateSegmentConfig,
    "compare": CompareConfig,
    "analyse": AnalyseConfig,
    "calibrate": CalibrateConfig,
    "calibrate-cascade": CascadeConfig,
    "vtab": VtabConfig,
}
