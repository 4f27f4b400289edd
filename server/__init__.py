"""Serving over HTTP: every request at the rate that it asks for, all on one set of weights.

Builds on `tocom` and `adapters`; knows nothing of training. What is not asked for is not
imported: a program that only talks to a server (`server.client`) needs no torch.
"""

from typing import TYPE_CHECKING

from tocom.on_demand import on_demand

if TYPE_CHECKING:
    from server.app import create_app
    from server.client import Client
    from server.settings import Settings
else:
    __getattr__ = on_demand(
        __name__, {"app": ["create_app"], "client": ["Client"], "settings": ["Settings"]}
    )

__all__ = ["Client", "Settings", "create_app"]


def __dir__() -> list[str]:
    return __all__
