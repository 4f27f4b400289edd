"""How tokens are reduced: one value a method, one file a method or family of methods."""

from tocom.reduction.clusters import DPCKNN, KMedoids
from tocom.reduction.grid import ATME, Pattern
from tocom.reduction.protocol import (
    Chosen,
    Cut,
    Fate,
    Method,
    Place,
    Seen,
    Tokens,
    Unit,
)
from tocom.reduction.registry import METHODS, method_of, options_of
from tocom.reduction.tome import ToMe

__all__ = [
    "ATME",
    "Chosen",
    "Cut",
    "DPCKNN",
    "Fate",
    "KMedoids",
    "METHODS",
    "Method",
    "Pattern",
    "Place",
    "Seen",
    "ToMe",
    "Tokens",
    "Unit",
    "method_of",
    "options_of",
]
