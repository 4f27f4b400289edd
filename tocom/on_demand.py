"""Packages whose names are imported where they are first used.

Torch and timm take seconds to import, which a program that only prints its help need not wait for.
"""

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any


def on_demand(package: str, names: Mapping[str, Sequence[str]]) -> Callable[[str], Any]:
    """Return the `__getattr__` of a package that imports its names where they are first used.

    Args:
        package: its name.
        names: of each of its modules, what the package has of it. None may be called like a module
            of the package: importing that module would put it in the name's place.
    """
    homes = {name: f"{package}.{module}" for module, found in names.items() for name in found}

    def get(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(homes[name]), name)

    return get
