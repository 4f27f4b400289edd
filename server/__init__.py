"""Serving over HTTP: every request at the rate that it asks for, all on one set of weights.

Builds on `tocom` and `adapters`; knows nothing of training. What is not asked for is not
imported: a program that only talks to a server (`server.client`) needs no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from server.app import create_app
    from server.engine import Answer, Engine
    from server.errors import ServerError
    from server.models import RateWork, ServedModel, load_model
    from server.scheduler import Work
    from server.settings import ModelSettings, Settings, load_settings

#: The public names and where they are.
_HOMES = {
    "Answer": "engine",
    "Engine": "engine",
    "ModelSettings": "settings",
    "RateWork": "models",
    "ServedModel": "models",
    "ServerError": "errors",
    "Settings": "settings",
    "Work": "scheduler",
    "create_app": "app",
    "load_model": "models",
    "load_settings": "settings",
}

__all__ = [
    "Answer",
    "Engine",
    "ModelSettings",
    "RateWork",
    "ServedModel",
    "ServerError",
    "Settings",
    "Work",
    "create_app",
    "load_model",
    "load_settings",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
