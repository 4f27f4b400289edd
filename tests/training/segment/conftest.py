"""Tiny scenes: squares of two colours on a ground, with their labels; a folder and a .tar of it."""

import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from training.segment.config import SegmentConfig

NAMES = ("ground", "red", "blue")


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A .tar, beside the folder that it was made of: 12 scenes to train on, 4 to test on."""
    root = tmp_path_factory.mktemp("scenes") / "data"
    noise = np.random.default_rng(0)
    for split, count in (("train", 12), ("test", 4)):
        (root / split / "images").mkdir(parents=True)
        (root / split / "labels").mkdir()
        for i in range(count):
            pixels = noise.integers(80, 120, (40, 48, 3), dtype=np.uint8)
            labels = np.zeros((40, 48), np.uint8)
            for label, channel in ((1, 0), (2, 2)):
                top, left = noise.integers(0, 20), noise.integers(0, 28)
                pixels[top : top + 20, left : left + 20] = 0
                pixels[top : top + 20, left : left + 20, channel] = 255
                labels[top : top + 20, left : left + 20] = label
            labels[:2] = 9
            Image.fromarray(pixels).save(root / split / "images" / f"{i}.png")
            Image.fromarray(labels).save(root / split / "labels" / f"{i}.png")
    with tarfile.open(root.with_suffix(".tar"), "w") as tar:
        for split in ("train", "test"):
            tar.add(root / split, arcname=split)
    return root.with_suffix(".tar")


def recipe(scenes: Path, model_folder: Path, **changes: Any) -> SegmentConfig:
    said: dict[str, Any] = {
        "name": "squares",
        "backbone": {"name": str(model_folder)},
        "scenes": {"path": str(scenes), "classes": NAMES, "ignored": (9,)},
        "width": 16,
        "heads": 2,
        "layers": 1,
        "augment": {"short_side": 32, "crop": (32, 32), "scale": (0.8, 1.5), "distort": False},
        "loop": {
            "epochs": 2,
            "batch_size": 6,
            "learning_rate": 3e-3,
            "optimizer": "adamw",
            "workers": 0,
            "save_every": 2,
            "watch_every": 2,
        },
    }
    for key, value in changes.items():
        said[key] = said.get(key, {}) | value if isinstance(value, dict) else value
    return SegmentConfig.model_validate(said)
