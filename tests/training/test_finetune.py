import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tocom import DataError, forward, load_backbone
from training.config import FinetuneConfig
from training.finetune import finetune


def recipe(pictures: Path, model_folder: Path, **changes: Any) -> FinetuneConfig:
    values: dict[str, Any] = {
        "name": "tiny",
        "backbone": {"name": str(model_folder)},
        "pictures": {"path": str(pictures)},
        "test": {"path": str(pictures)},
        "drop_path": 0.1,
        "augment": {"color_jitter": 0, "scale": [0.8, 1.0]},
        "loop": {
            "steps": 40,
            "batch_size": 12,
            "learning_rate": 3e-3,
            "workers": 0,
            "save_every": 20,
        },
    }
    return FinetuneConfig.model_validate(values | changes)


@pytest.mark.parametrize("source", [0, 4])
def test_tuned_model_learns_and_is_a_model_folder(
    pictures: Path, model_folder: Path, tmp_path: Path, source: int
) -> None:
    folder = finetune(recipe(pictures, model_folder, source=source), tmp_path / "run")
    backbone = load_backbone(str(folder))
    assert backbone.class_names == ("blue", "green", "red")
    assert backbone.source == source
    assert backbone.tuned_from == load_backbone(str(model_folder)).digest
    said = json.loads((folder / "config.json").read_text())["training"]
    assert said["test_accuracy"] > 0.6  # chance is 1/3; the colours are easy
    assert forward(backbone.model, torch.zeros(1, 3, 32, 32), source).shape == (1, 3)


def test_train_and_test_folders_must_be_the_same_classes(
    pictures: Path, model_folder: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    (other / "blue").mkdir(parents=True)
    source = pictures.parent / "blue" / "0.png"
    (other / "blue" / "0.png").write_bytes(source.read_bytes())
    config = recipe(pictures, model_folder, test={"path": str(other)})
    with pytest.raises(DataError, match="has 3 classes and .* 1; they must be the same"):
        finetune(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
