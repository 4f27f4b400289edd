"""What becomes of a scene: picture and labels are scaled, cropped and mirrored alike.

Reference: Segmenter, arXiv:2105.05633, section 4.1, and MMSegmentation, whose pipeline it uses.
"""

import random
from collections.abc import Callable, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from training.pictures.augment import Finish
from training.segment.config import SceneAugmentConfig
from training.segment.metrics import IGNORED
from training.segment.scenes import Scene

#: Crops that are tried until no class has too much of one.
_TRIES = 10


class SceneTransform:
    """A transform of a scene to (bytes [3, H, W], labels [H, W])."""

    def __init__(
        self, mean: Sequence[float], std: Sequence[float], change: Callable[[Scene], Scene]
    ) -> None:
        """Take what normalises pictures, and what changes a scene."""
        self.mean, self.std, self.change = mean, std, change

    def __call__(self, scene: Scene) -> tuple[Tensor, Tensor]:
        """Return a scene as tensors."""
        picture, labels = self.change(scene)
        pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
        return pixels.contiguous(), torch.from_numpy(np.array(labels))

    def finish(self, device: torch.device | str) -> Finish:
        """Return what normalises batches on `device`."""
        return Finish(self.mean, self.std, device=device)


class TrainScene:
    """Scaled by chance, cropped, mirrored, distorted; it draws from `random` and torch."""

    def __init__(self, config: SceneAugmentConfig, mean: Sequence[float]) -> None:
        """Remember the recipe; what is beyond a picture has the mean colour."""
        self.config = config
        self.fill = tuple(round(255 * each) for each in mean)
        self.distort = v2.RandomPhotometricDistort() if config.distort else None

    def __call__(self, scene: Scene) -> Scene:
        """Return the scene as it is trained on, of the crop's size."""
        factor = self.config.short_side * random.uniform(*self.config.scale)
        factor /= min(scene.picture.size)
        width, height = (max(1, round(factor * side)) for side in scene.picture.size)
        scene = self._crop(_resized(scene, height, width))
        if random.random() < self.config.hflip:
            flip = Image.Transpose.FLIP_LEFT_RIGHT
            scene = Scene(scene.picture.transpose(flip), scene.labels.transpose(flip))
        if self.distort is not None:
            scene = scene._replace(picture=self.distort(scene.picture))
        return scene

    def _crop(self, scene: Scene) -> Scene:
        high, wide = self.config.crop
        width, height = scene.picture.size
        for _ in range(_TRIES):
            top = random.randint(0, max(0, height - high))
            left = random.randint(0, max(0, width - wide))
            box = (left, top, min(width, left + wide), min(height, top + high))
            labels = scene.labels.crop(box)
            pixels = np.bincount(np.asarray(labels).ravel(), minlength=256)[:IGNORED]
            if pixels.max() <= self.config.most * pixels.sum():
                break
        picture = scene.picture.crop(box)
        if picture.size == (wide, high):
            return Scene(picture, labels)
        whole = Scene(
            Image.new("RGB", (wide, high), self.fill), Image.new("L", (wide, high), IGNORED)
        )
        whole.picture.paste(picture)
        whole.labels.paste(labels)
        return whole


class TestScene:
    """The picture as it is measured; its labels as they are."""

    __test__ = False  # pytest would take it for tests

    def __init__(self, size: Callable[[int, int], tuple[int, int]]) -> None:
        """Take what says to which height and width a picture is brought."""
        self.size = size

    def __call__(self, scene: Scene) -> Scene:
        """Return the scene with its picture resized."""
        width, height = scene.picture.size
        high, wide = self.size(height, width)
        return scene._replace(picture=scene.picture.resize((wide, high), Image.Resampling.BILINEAR))


def _resized(scene: Scene, height: int, width: int) -> Scene:
    return Scene(
        scene.picture.resize((width, height), Image.Resampling.BILINEAR),
        scene.labels.resize((width, height), Image.Resampling.NEAREST),
    )
