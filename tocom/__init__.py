"""The core of ToCom Serve: timm's Vision Transformers at any rate, with deltas.

Pure functions; a model is never patched, mutated or copied per rate. Knows nothing of
banks, training or serving, which build on it.
"""

from typing import TYPE_CHECKING

from tocom.errors import (
    BackboneError,
    BankError,
    ConfigError,
    DataError,
    DeltaError,
    RateError,
    ReductionError,
    ShapeError,
    StoreError,
    TaskError,
    TocomError,
    UnsupportedModelError,
)
from tocom.on_demand import on_demand
from tocom.schedule import Rate, schedule

if TYPE_CHECKING:
    from tocom.adapter import Adapter
    from tocom.backbones import Backbone, bundled_folder, load_backbone
    from tocom.costs import Cost, cost
    from tocom.delta import AnyDelta, Delta, FoldedWeights, LowRank, check_delta, fold
    from tocom.dense import forward_dense
    from tocom.ladder import TOME, Ladder, Plan, plan
    from tocom.merging import Match, match, merge, unmerge
    from tocom.reduction.weights import ReductionWeights
    from tocom.supported import check_supported
    from tocom.variant import Variant
    from tocom.vit import Trace, forward, forward_features, trace
else:
    __getattr__ = on_demand(
        __name__,
        {
            "adapter": ["Adapter"],
            "backbones": ["Backbone", "bundled_folder", "load_backbone"],
            "costs": ["Cost", "cost"],
            "delta": ["AnyDelta", "Delta", "FoldedWeights", "LowRank", "check_delta", "fold"],
            "dense": ["forward_dense"],
            "ladder": ["TOME", "Ladder", "Plan", "plan"],
            "merging": ["Match", "match", "merge", "unmerge"],
            "reduction.weights": ["ReductionWeights"],
            "supported": ["check_supported"],
            "variant": ["Variant"],
            "vit": ["Trace", "forward", "forward_features", "trace"],
        },
    )

__all__ = [
    "Adapter",
    "AnyDelta",
    "Backbone",
    "BackboneError",
    "BankError",
    "ConfigError",
    "Cost",
    "DataError",
    "Delta",
    "DeltaError",
    "FoldedWeights",
    "Ladder",
    "LowRank",
    "Match",
    "Plan",
    "Rate",
    "RateError",
    "ReductionError",
    "ReductionWeights",
    "ShapeError",
    "StoreError",
    "TOME",
    "TaskError",
    "TocomError",
    "Trace",
    "UnsupportedModelError",
    "Variant",
    "bundled_folder",
    "check_delta",
    "check_supported",
    "cost",
    "fold",
    "forward",
    "forward_dense",
    "forward_features",
    "load_backbone",
    "match",
    "merge",
    "plan",
    "schedule",
    "trace",
    "unmerge",
]


def __dir__() -> list[str]:
    return __all__
