"""A task of segmentation on the tiny model, on disk as users would have it."""

from pathlib import Path

from adapters import BackboneInfo
from adapters.segmentation import DecoderInfo
from server.settings import ModelSettings
from tests.adapters.segmentation.test_task import task
from tocom import load_backbone

SEED = 3


def streets(tiny: ModelSettings, folder: Path) -> ModelSettings:
    """Return the settings of a segmenter: windows of 64 pixels, three classes, and branches.

    Its weights are such that photos have pixels of all classes, and other ones at other rates.
    """
    made = task(
        seed=SEED,
        backbone=BackboneInfo.of(load_backbone(tiny.backbone)),
        decoder=DecoderInfo(kind="linear"),
        method="adaptformer",
        rank=4,
        scale=0.1,
        short_side=64,
    )
    made.save(folder / "streets")
    return tiny.model_copy(update={"name": "streets", "task": str(folder / "streets")})
