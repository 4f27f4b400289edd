"""What becomes of a picture: timm's transforms, and its mixing of pictures."""

import math
from typing import Any

from PIL import Image, ImageOps
from timm.data import Mixup, auto_augment, create_transform
from timm.data.transforms import RandomResizedCropAndInterpolation

from tocom import Backbone, ConfigError
from training.config import AugmentConfig


def train_transform(backbone: Backbone, augment: AugmentConfig) -> Any:
    """Return timm's training transform for what `backbone` wants to see.

    Raises:
        ConfigError: if timm does not know the augmentation.
    """
    if augment.crop == "evaluation":
        return evaluation_transform(backbone)
    config = backbone.data_config
    try:
        return create_transform(
            input_size=config["input_size"],
            is_training=True,
            scale=augment.scale,
            hflip=augment.hflip,
            color_jitter=augment.color_jitter,
            auto_augment=augment.auto_augment,
            re_prob=augment.erasing,
            re_mode="pixel",
            interpolation=augment.interpolation or config["interpolation"],
            mean=config["mean"],
            std=config["std"],
        )
    except (AssertionError, KeyError, ValueError) as error:
        raise ConfigError(
            f"auto_augment is in timm's notation, such as rand-m9-mstd0.5-inc1; got "
            f"{augment.auto_augment!r}: {error}"
        ) from error


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
