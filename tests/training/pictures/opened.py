"""Pictures under a strong augmentation, and generators that are left somewhere else."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tocom import Backbone
from training.config import AugmentConfig
from training.pictures.augment import train_transform
from training.pictures.batches import Pictures
from training.pictures.config import PicturesConfig

STRONG = AugmentConfig(
    auto_augment="rand-m9-mstd0.5-inc1", erasing=0.5, interpolation="random", scale=(0.2, 1.0)
)


def opened(
    path: Path, backbone: Backbone, augment: AugmentConfig = STRONG, **more: Any
) -> Pictures:
    return Pictures([PicturesConfig(path=str(path))], train_transform(backbone, augment), **more)


def scramble() -> None:
    """Leave every generator somewhere else."""
    random.gauss(0, 1)
    np.random.standard_normal()
    torch.randn(())
