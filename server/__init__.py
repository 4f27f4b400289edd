"""Serving over HTTP: every request at the rate that it asks for, all on one set of weights.

Builds on `tocom` and `adapters`; knows nothing of training. What is not asked for is not
imported: a program that only talks to a server (`server.client`) needs no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from server.app import create_app
    from server.client import Client
    from server.settings import Settings

__all__ = ["Client", "Settings", "create_app"]

_HOMES = {"Client": "client", "Settings": "settings", "create_app": "app"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
