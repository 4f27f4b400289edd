"""Pictures as models see them: upright and in RGB, the same in training and in service."""

import numpy as np
from PIL import ExifTags, Image

#: What turns an image upright, by the orientation in its metadata.
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def exif_of(image: Image.Image) -> bytes:
    """Return the Exif metadata of a decoded image; Pillow finds it there from now on."""
    profile = image.info.get("Raw profile type exif")  # as ImageMagick wrote it into PNGs
    if profile is not None and "exif" not in image.info:
        image.info["exif"] = bytes.fromhex("".join(profile.split("\n")[3:]))
    return bytes(image.info.get("exif", b""))


def turn_of(image: Image.Image) -> Image.Transpose | None:
    """Return what turns or mirrors a decoded image upright, by its metadata.

    Not `ImageOps.exif_transpose`, which would also write the metadata anew, with all that it
    refers to.
    """
    exif_of(image)
    return UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation, 1))


def in_rgb(image: Image.Image) -> Image.Image:
    """Return an image in RGB: itself, if it is."""
    if image.mode.startswith("I"):
        # 16 bits of grey. Pillow would clip all above 255 to white.
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image if image.mode == "RGB" else image.convert("RGB")
