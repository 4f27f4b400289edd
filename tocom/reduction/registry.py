"""The methods by their names."""

from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

from tocom.errors import ReductionError
from tocom.reduction.around import AroundMLP
from tocom.reduction.ats import ATS
from tocom.reduction.attentive import EViT, TopK
from tocom.reduction.clusters import DPCKNN, KMedoids
from tocom.reduction.diffrate import DiffRate
from tocom.reduction.dtem import DTEM
from tocom.reduction.grid import ATME, Pattern
from tocom.reduction.learned import DynamicViT, PatchMerger, Sinkhorn, SiT
from tocom.reduction.mctf import MCTF
from tocom.reduction.protocol import Method
from tocom.reduction.tome import ToMe

#: One line a method.
METHODS: dict[str, type[Method]] = {
    each.name: each
    for each in (
        ToMe,
        AroundMLP,
        DTEM,
        KMedoids,
        DPCKNN,
        Pattern,
        ATME,
        MCTF,
        DiffRate,
        TopK,
        EViT,
        ATS,
        DynamicViT,
        SiT,
        PatchMerger,
        Sinkhorn,
    )
}  # fmt: skip


def method_of(name: str, options: Mapping[str, Any] | None = None) -> Method:
    """Return a method by its name and options.

    Raises:
        ReductionError: naming what there is, if the name, an option or its value is none of it.
    """
    if name not in METHODS:
        raise ReductionError(f"there is no method {name!r}; there are {', '.join(METHODS)}")
    known = [field.name for field in fields(METHODS[name])]  # type: ignore[arg-type]
    for option in options or {}:
        if option not in known:
            allowed = f"its options are {', '.join(known)}" if known else "it has no options"
            raise ReductionError(f"the method {name!r} has no option {option!r}; {allowed}")
    return METHODS[name](**(options or {}))


def options_of(method: Method) -> dict[str, Any]:
    """Return the options of a method, by their names."""
    options: dict[str, Any] = asdict(method)  # type: ignore[call-overload]
    return options
