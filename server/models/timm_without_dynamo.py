"""Imports timm without `torch._dynamo`, which takes longer to import than torch does.

A server compiles nothing by `torch.compile`. All the same timm marks functions of NaFlexViT as
none of its business, and torchvision, which timm imports, wants to know whether it could compile
`roi_align`: each imports `torch._dynamo` for that. Here it stands in for itself until timm is
imported. To be imported before all else that may import timm, by programs that do not compile.
"""

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

_PACKAGE = "torch._dynamo"


class _Package(ModuleType):
    @staticmethod
    def disable(function: Callable[..., Any], *_: Any, **__: Any) -> Any:
        return function


class _Utils(ModuleType):
    @staticmethod
    def is_compile_supported(_: Any) -> bool:
        return False


def _import_timm() -> None:
    if _PACKAGE in sys.modules:
        return
    stand_ins = {
        _PACKAGE: _Package(_PACKAGE),
        f"{_PACKAGE}.utils": _Utils(f"{_PACKAGE}.utils"),
    }
    sys.modules.update(stand_ins)
    try:
        import timm  # noqa: F401
    finally:
        for name in stand_ins:
            del sys.modules[name]


_import_timm()
