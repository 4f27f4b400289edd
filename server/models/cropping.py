"""The transform of a model, less the work that its crop throws away.

Transforms resize the shorter side of a picture to what the model wants and cut a square out of
the middle. Of a strip of 1 x 100 pixels they make 24,800 rows to keep 224 of them. Here only the
rows, or columns, that are kept are made, if a long picture is enlarged; to shrink one costs less
than decoding it did. What comes out is the same, but for one level of 256, two at most, in less
than one pixel of a hundred. All other pictures go through the transform as it is.
"""

from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from timm.data.transforms import ResizeKeepRatio
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision.transforms import CenterCrop, Resize

#: How often the resized long side holds what is kept of it. No camera's panorama is that long,
#: and up to here the wasted work is less than that of decoding an ordinary photograph.
LONG = 8

#: How many pixels around a place are read to enlarge a picture; Lanczos, the widest filter, reads
#: 3, and one more makes up for rounding.
MARGIN = 4


def transformed(image: Image.Image, transform: Any, fast: bool = False) -> Tensor:
    """Return the image [3, H, W] that a transform of timm makes of an RGB picture.

    Args:
        image: the picture.
        transform: what timm makes for a model.
        fast: whether torch resizes instead of Pillow.
    """
    steps = getattr(transform, "transforms", [])
    if len(steps) > 1 and isinstance(steps[1], CenterCrop):
        resized = _resized_middle(image, steps[0], steps[1])
        if resized is None and fast:
            resized = _resized_by_torch(image, steps[0])
        if resized is not None:
            for step in steps[1:]:
                resized = step(resized)
            return cast("Tensor", resized)
    return cast("Tensor", transform(image))


def _resized_by_torch(image: Image.Image, resize: Any) -> Image.Image | None:
    """Return the resized picture; None: torch does not resize as the transform says."""
    size = _resized_size(image, resize)
    mode = getattr(resize.interpolation, "value", None)
    if size is None or mode not in ("bilinear", "bicubic"):
        return None
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    made = interpolate(pixels[None], (size[1], size[0]), mode=mode, antialias=True)[0]
    return Image.fromarray(made.permute(1, 2, 0).numpy())


def _resized_middle(image: Image.Image, resize: Any, crop: CenterCrop) -> Image.Image | None:
    """Return the middle of the resized picture, as long as the crop keeps it, of its full breadth.

    None: it is not long, or not enlarged, or the transform does not resize by the shorter side.
    """
    size = _resized_size(image, resize)
    if size is None:
        return None
    along = 0 if image.width > image.height else 1
    kept, whole, pixels = tuple(crop.size)[1 - along], size[along], image.size[along]
    if whole <= LONG * kept or whole <= pixels:
        return None
    scale, first = pixels / whole, round((whole - kept) / 2)  # as torchvision rounds
    # Pillow takes places in single precision, which is coarse far from the start: so the picture
    # is cut first, at whole pixels.
    start = max(0, int(first * scale) - MARGIN)
    stop = min(pixels, int((first + kept) * scale) + MARGIN)
    places = first * scale - start, (first + kept) * scale - start
    resample = Image.Resampling[resize.interpolation.name]
    # Columns before rows, as Pillow enlarges all at once.
    if along == 0:
        cut = image.crop((start, 0, stop, image.height))
        columns = cut.resize((kept, cut.height), resample, (places[0], 0, places[1], cut.height))
        return columns.resize((kept, size[1]), resample)
    columns = image.crop((0, start, image.width, stop)).resize((size[0], stop - start), resample)
    return columns.resize((size[0], kept), resample, (0, places[0], size[0], places[1]))


def _resized_size(image: Image.Image, resize: Any) -> tuple[int, int] | None:
    """Return the width and height that a step resizes a picture to, by its shorter side."""
    if isinstance(resize, Resize) and isinstance(resize.size, int):
        shorter, longer = sorted(image.size)
        size, long = resize.size, int(resize.size * longer / shorter)
        return (long, size) if image.width > image.height else (size, long)
    if isinstance(resize, ResizeKeepRatio) and not resize.longest:
        height, width = ResizeKeepRatio.get_params(image, resize.size, resize.longest)
        return width, height
    return None
