"""What becomes of a picture: timm's transforms, and its mixing of pictures.

To train, a picture leaves the process that read it as bytes, a quarter of what its normalised
values would be. What timm does to those is done to whole batches, on the device: `Finish`.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image, ImageOps
from timm.data import Mixup, auto_augment, create_transform
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import RandomResizedCropAndInterpolation
from torch import Tensor
from torchvision.transforms import Compose

from tocom import Backbone, ConfigError
from training.config import AugmentConfig


class Finish:
    """What is left to do with a batch of pictures where it is trained on: normalising, erasing."""

    def __init__(
        self,
        mean: Sequence[float],
        std: Sequence[float],
        erasing: float = 0.0,
        device: torch.device | str = "cpu",
    ) -> None:
        """Put on the device what every batch needs.

        Args:
            mean, std: of each channel, for values from 0 to 1.
            erasing: probability that a box of a picture is erased, with noise.
            device: of the batches.
        """
        self.mean = torch.tensor(mean, device=device).view(-1, 1, 1)
        self.std = torch.tensor(std, device=device).view(-1, 1, 1)
        self.erase = RandomErasing(erasing, mode="pixel", device=device) if erasing else None

    def __call__(self, images: Tensor) -> Tensor:
        """Return the pictures as the model wants them, in fp32.

        The normalised values are to the last bit those of timm's transform. What is erased is
        drawn from `random` and from torch's generator.

        Args:
            images: [B, 3, H, W], uint8.
        """
        # In the order of timm's transform, which scales first; its prefetcher scales mean and std.
        values = images.to(torch.float32, memory_format=torch.contiguous_format)
        values = values.div_(255).sub_(self.mean).div_(self.std)
        return values if self.erase is None else self.erase(values)


class TrainTransform(Compose):  # type: ignore[misc]  # torchvision ships no types
    """timm's transform of a picture to train on, up to bytes [3, H, W]."""

    def __init__(self, steps: Sequence[Any], config: dict[str, Any], erasing: float = 0.0) -> None:
        """Take the steps, the last of which makes a tensor of bytes.

        Args:
            steps: of timm's transform.
            config: the backbone's data config, with `mean` and `std`.
            erasing: as in `Finish`.
        """
        super().__init__(steps)
        self.mean, self.std, self.erasing = config["mean"], config["std"], erasing

    def finish(self, device: torch.device | str) -> Finish:
        """Return the rest of the transform, for batches on `device`."""
        return Finish(self.mean, self.std, self.erasing, device)


def train_transform(backbone: Backbone, augment: AugmentConfig) -> TrainTransform:
    """Return timm's training transform for what `backbone` wants to see.

    Raises:
        ConfigError: if timm does not know the augmentation.
    """
    config = backbone.data_config
    if augment.crop == "evaluation":
        steps = create_transform(**config, is_training=False, normalize=False)
        return TrainTransform(steps.transforms, config)
    try:
        steps = create_transform(
            input_size=config["input_size"],
            is_training=True,
            scale=augment.scale,
            hflip=augment.hflip,
            color_jitter=augment.color_jitter,
            auto_augment=augment.auto_augment,
            interpolation=augment.interpolation or config["interpolation"],
            mean=config["mean"],  # what a rotation fills its corners with
            normalize=False,
        )
    except (AssertionError, KeyError, ValueError) as error:
        raise ConfigError(
            f"auto_augment is in timm's notation, such as rand-m9-mstd0.5-inc1; got "
            f"{augment.auto_augment!r}: {error}"
        ) from error
    return TrainTransform(steps.transforms, config, augment.erasing)


def evaluation_transform(backbone: Backbone) -> Any:
    """Return timm's evaluation transform of `backbone`."""
    return create_transform(**backbone.data_config, is_training=False)


def posterize(image: Image.Image, bits: int, **_: Any) -> Image.Image:
    """Keep the highest `bits` of each channel; none: black."""
    if bits < 1:
        return Image.new(image.mode, image.size)
    return ImageOps.posterize(image, min(bits, 8))


# RandAugment's strongest magnitude keeps no bits, which Pillow answered with black before version
# 13 and with an error since.
for _name in ("Posterize", "PosterizeIncreasing", "PosterizeOriginal"):
    auto_augment.NAME_TO_OP[_name] = posterize


def mixing(augment: AugmentConfig, classes: int, label_smoothing: float) -> Mixup | None:
    """Return timm's mixup and cutmix, or None where there is neither.

    It is called with (images [B, 3, H, W], classes [B]), B even; it changes the images in place
    and returns them with targets [B, classes]. It draws from `numpy.random`.
    """
    if not augment.mixup and not augment.cutmix:
        return None
    return Mixup(
        mixup_alpha=augment.mixup,
        cutmix_alpha=augment.cutmix,
        prob=augment.mix_probability,
        switch_prob=augment.mix_switch,
        label_smoothing=label_smoothing,
        num_classes=classes,
    )


def least_side(transform: Any) -> int | None:
    """Return the side below which the smallest random crop of a picture would lose detail."""
    crop = transform.transforms[0]
    if not isinstance(crop, RandomResizedCropAndInterpolation):
        return None  # measuring decodes every pixel
    side: int = max(crop.size)
    return math.ceil(side / math.sqrt(crop.scale[0] * min(crop.ratio)))
