"""Serving over HTTP: every request at the rate that it asks for, all on one set of weights.

Builds on `tocom` and `adapters`; knows nothing of training.
"""

from server.app import create_app
from server.engine import Answer, Engine, Work
from server.errors import ServerError
from server.models import RateWork, ServedModel, load_model
from server.settings import ModelSettings, Settings, load_settings

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
