"""A small study of two tasks."""

import json
from pathlib import Path
from typing import Any

from training.vtab.config import VtabConfig

COLOURS = {"name": "Colours", "folder": "colours", "group": "Natural", "classes": 3}
CHANGES = (
    "adaptformer.bottleneck=4",
    "search.values=[0.1, 1.0]",
    "loop.epochs=1",
    "loop.batch_size=6",
    "loop.learning_rate=0.01",
    "loop.workers=0",
)


def recipe(root: Path, model_folder: Path, **changes: Any) -> VtabConfig:
    values: dict[str, Any] = {
        "root": str(root),
        "tasks": [COLOURS, COLOURS | {"name": "Shades", "folder": "shades", "group": "Structured"}],
        "sources": [0, 2],
        "targets": [0, 3],
        "changes": [f"backbone.name={json.dumps(str(model_folder))}", *CHANGES],
    }
    return VtabConfig.model_validate(values | changes)
