"""The cascades that models are served with, as their settings or their folders say."""

import logging
from pathlib import Path

from adapters.cascade import FILE, Cascade, read_cascade
from server.models.served import ServedModel
from server.settings import ModelSettings
from tocom import ConfigError, bundled_folder
from tocom.backbones import BUNDLED

logger = logging.getLogger(__name__)


def open_cascade(settings: ModelSettings) -> Cascade | None:
    """Return the cascade that settings name, or else that of the task's or the model's folder.

    Raises:
        ConfigError: if it cannot be read or is malformed.
        BackboneError: if nothing bundled is called so.
    """
    if settings.cascade is not None:
        return read_cascade(_path(settings.cascade))
    path = _path(settings.task or settings.backbone) / FILE
    return read_cascade(path) if path.is_file() else None


def check_cascade(model: ServedModel, settings: ModelSettings) -> None:
    """Tell of a cascade that is for none of the model's ladders as it is served.

    Raises:
        ConfigError: if it is one that settings name.
    """
    others = [misfit(each) for each in model.ladders]
    if model.cascade is None or None in others:
        return
    said = f"model {model.name!r}: its cascade was calibrated for the {others[0]}"
    if settings.cascade is not None:
        raise ConfigError(f"{said}; calibrate again, or leave it out")
    logger.warning("%s: rate=cascade is refused", said)


def misfit(model: ServedModel) -> str | None:
    """Return what a model's cascade is for that the model on this ladder is not; None: it fits."""
    if model.cascade is None:
        return None
    backbone = model.backbone
    found = model.cascade.misfit(
        backbone.digest, backbone.task_digest, model.bank_digest, model.ladder, model.source
    )
    highest = max(point.rates[0] for point in model.cascade.points)  # the rates of a point fall
    if found is None and highest > model.max_rate:
        return f"rate {highest}, served are 0 to {model.max_rate}"
    return found


def _path(name: str) -> Path:
    if name.startswith(BUNDLED):
        return bundled_folder(name.removeprefix(BUNDLED))
    return Path(name.removeprefix("local-dir:"))
