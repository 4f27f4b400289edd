"""The tiny model that the pictures are for."""

from pathlib import Path

import pytest

from tocom import Backbone, load_backbone


@pytest.fixture(scope="module")
def backbone(model_folder: Path) -> Backbone:
    return load_backbone(str(model_folder))
