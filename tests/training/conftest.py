"""A tiny task: three classes of coloured noise, and a tiny model folder."""

import tarfile
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from matplotlib.figure import Figure
from PIL import Image
from timm.models import save_for_hf

from training.run_folder import RunFolder

ARGUMENTS = {"img_size": 32, "depth": 2, "embed_dim": 24, "num_heads": 2, "num_classes": 3}


@pytest.fixture(autouse=True)
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs draw no curves, which takes longer than their few steps."""
    monkeypatch.setattr(RunFolder, "draw", lambda _: None)


@pytest.fixture(autouse=True)
def unrendered(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are put together but not drawn, which takes longer than what they show."""
    if request.node.get_closest_marker("rendered") is None:
        drawn = b"a figure"
        monkeypatch.setattr(Figure, "savefig", lambda _, path, **__: path.write_bytes(drawn))


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A .tar of class folders: 24 pictures, each class leaning to one colour."""
    root = tmp_path_factory.mktemp("pictures")
    noise = np.random.default_rng(0)
    for label, name in enumerate(("blue", "green", "red")):
        (root / name).mkdir()
        for i in range(8):
            pixels = noise.integers(0, 120, (40, 40, 3), dtype=np.uint8)
            pixels[..., 2 - label] += 130
            Image.fromarray(pixels).save(root / name / f"{i}.png")
    with tarfile.open(root / "pictures.tar", "w") as tar:
        for name in ("blue", "green", "red"):
            tar.add(root / name, arcname=name)
    return root / "pictures.tar"


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder in timm's form, randomly initialised and away from trivial."""
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", patch_size=8, **ARGUMENTS)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=parameter.mean().item(), std=0.2)
    folder = tmp_path_factory.mktemp("model")
    save_for_hf(
        model,
        str(folder),
        model_config={"label_names": ["blue", "green", "red"]},
        model_args={"patch_size": 8, **ARGUMENTS},
        data_config={"input_size": (3, 32, 32)},
        safe_serialization=True,
    )
    return folder
