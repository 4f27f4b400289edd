"""A task of segmentation on the tiny model, on disk as users would have it."""

from pathlib import Path

from adapters import BackboneInfo
from server.settings import ModelSettings
from tests.adapters.segmentation.test_task import task
from tocom import load_backbone


def streets(tiny: ModelSettings, folder: Path) -> ModelSettings:
    """Return the settings of a segmenter: windows of 64 pixels, three classes, and branches."""
    own = BackboneInfo.of(load_backbone(tiny.backbone))
    made = task(backbone=own, method="adaptformer", rank=4, scale=0.1, short_side=64)
    made.save(folder / "streets")
    return tiny.model_copy(update={"name": "streets", "task": str(folder / "streets")})
