"""How tokens are reduced: one value a method, one file a method or family of methods."""

from tocom.reduction.ats import ATS
from tocom.reduction.attentive import EViT, TopK
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
    "ATS",
    "Chosen",
    "Cut",
    "EViT",
    "Fate",
    "METHODS",
    "Method",
    "Place",
    "Seen",
    "ToMe",
    "Tokens",
    "TopK",
    "Unit",
    "method_of",
    "options_of",
]
