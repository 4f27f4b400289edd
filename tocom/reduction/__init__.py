"""How tokens are reduced: one value a method, one file a method or family of methods."""

from tocom.reduction.around import AroundMLP
from tocom.reduction.ats import ATS
from tocom.reduction.attentive import EViT, TopK
from tocom.reduction.clusters import DPCKNN, KMedoids
from tocom.reduction.diffrate import DiffRate
from tocom.reduction.dtem import DTEM
from tocom.reduction.grid import ATME, Pattern
from tocom.reduction.learned import DynamicViT, PatchMerger, Sinkhorn, SiT
from tocom.reduction.mctf import MCTF
from tocom.reduction.protocol import (
    Chosen,
    Cut,
    Fate,
    Heads,
    Method,
    Place,
    Seen,
    Tokens,
    Unit,
)
from tocom.reduction.registry import METHODS, method_of, options_of
from tocom.reduction.tome import ToMe
from tocom.reduction.weights import ReductionWeights

__all__ = [
    "ATME",
    "ATS",
    "AroundMLP",
    "Chosen",
    "Cut",
    "DPCKNN",
    "DTEM",
    "DiffRate",
    "DynamicViT",
    "EViT",
    "Fate",
    "Heads",
    "KMedoids",
    "MCTF",
    "METHODS",
    "Method",
    "PatchMerger",
    "Pattern",
    "Place",
    "ReductionWeights",
    "Seen",
    "SiT",
    "Sinkhorn",
    "ToMe",
    "Tokens",
    "TopK",
    "Unit",
    "method_of",
    "options_of",
]
