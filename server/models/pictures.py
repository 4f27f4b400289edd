"""From the bytes of an upload to the image that a model wants, or to an error that says why not.

Everything is checked before it costs memory: the format by its content, the metadata by its
amount, then the size. Then the pixels are read, no more at a time in the whole process than one
picture may have. Resizing and normalising are the model's own transform.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO

from PIL import Image, ImageFile, UnidentifiedImageError
from torch import Tensor

from server.errors import BadRequestError, ImageError, TooLargeError, UnsupportedTypeError
from server.models.budget import DECODING
from server.models.containers import check_container, check_tags, other_format
from server.models.cropping import transformed
from server.models.served import ServedModel
from server.settings import Settings
from tocom.pictures import exif_of, in_rgb, turn_of

#: Pillow knows some forty formats; a server needs these and none of the others' decoders.
FORMATS = ("JPEG", "PNG", "WEBP")

#: Longest side : shortest side. Of a longer picture a model would see less than a hundredth.
MAX_ASPECT = 100


def prepare(data: bytes | bytearray, model: ServedModel, settings: Settings) -> Tensor:
    """Decode an uploaded image and bring it into the form [3, H, W] that the model wants.

    Raises:
        ServerError: what `decoding` raises.
    """
    least_side = model.least_side if settings.reduce_jpegs else None
    with decoding(data, settings.max_pixels, least_side) as picture:
        return transformed(picture, model.transform, settings.fast_resize)


@contextmanager
def decoding(
    data: bytes | bytearray,
    max_pixels: int,
    least_side: int | None = None,
    max_aspect: int = MAX_ASPECT,
) -> Iterator[Image.Image]:
    """Decode an image, upright and in RGB, once there is room for its pixels; they are held.

    Args:
        data: a JPEG, PNG or WebP file; of an animation the first frame is taken.
        max_pixels: what width x height may be.
        least_side: a JPEG may come out at 1/2, 1/4 or 1/8 of its size, which decodes faster, as
            long as both sides keep so many pixels; None: at its own size.
        max_aspect: how often the shorter side may fit into the longer one.

    Raises:
        BadRequestError: if there are no bytes.
        UnsupportedTypeError: if it is none of the formats.
        TooLargeError: if it has too many pixels; none of them was decoded then.
        ImageError: if it is truncated, damaged, far too elongated or mostly metadata.
    """
    image = _open(data, max_pixels, least_side, max_aspect)
    with DECODING.hold(_pixels_in_memory(image), max_pixels):
        yield _load(image)


def _open(
    data: bytes | bytearray, max_pixels: int, least_side: int | None, max_aspect: int
) -> ImageFile.ImageFile:
    """Open an image without decoding it; arguments and errors as in `decoding`."""
    if not data:
        raise BadRequestError("the image is empty: it has no bytes")
    check_container(data)
    try:
        with _image_errors():
            image = Image.open(BytesIO(data), formats=FORMATS)
            _check_size(*image.size, max_pixels, max_aspect)
            if least_side is not None:
                image.draft(None, (least_side, least_side))
            return image
    except UnidentifiedImageError:
        raise UnsupportedTypeError(_refusal(other_format(data))) from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise TooLargeError(
            f"the image has far more than the {max_pixels:,} pixels that are allowed"
        ) from None


def _refusal(kind: str | None) -> str:
    """Say that a format is not read here, and what to do about it if it is known.

    Pillow could read some more. Each would be another decoder that strangers' bytes get to, whose
    metadata and frames nothing here counts.
    """
    allowed = "not a JPEG, PNG or WebP image"
    if kind is None:
        return f"the content is {allowed}"
    suffix = {"JPEG XL": "jxl", "JPEG 2000": "jp2"}.get(kind, kind.lower())
    file = f"photo.{suffix}"
    if kind in ("GIF", "PDF", "TIFF"):
        file = f"'{file}[0]'"  # the first picture of several
    return (
        f"the content is {kind}, {allowed}; convert it to JPEG or PNG, e.g. "
        f"`magick {file} photo.jpg`"
    )


def _pixels_in_memory(image: ImageFile.ImageFile) -> int:
    """Return how many pixels are held while an open image is decoded."""
    width, height = image.size
    if image.info.get("progressive"):
        # Its coefficients are held at full size, of which `draft` keeps no note but the scale.
        scale = image.decoderconfig[0] if image.decoderconfig else 1
        return width * height * scale**2
    return width * height


def _load(image: ImageFile.ImageFile) -> Image.Image:
    """Decode an open image, upright and in RGB; errors as in `decoding`."""
    with _image_errors():
        image.load()
        check_tags(exif_of(image))
        turn = turn_of(image)
        rgb = in_rgb(image)
        if rgb is not image:
            image.close()  # so that not all that was made on the way is held at once
        return rgb if turn is None else rgb.transpose(turn)


@contextmanager
def _image_errors() -> Iterator[None]:
    """Make an `ImageError` of whatever a decoder raises."""
    try:
        yield
    except (
        ImageError,
        TooLargeError,
        UnidentifiedImageError,
        Image.DecompressionBombError,
        Image.DecompressionBombWarning,
    ):
        raise
    except Exception as error:  # Pillow's decoders raise what their formats make them raise
        raise ImageError(f"the image cannot be decoded: {error}") from error


def _check_size(width: int, height: int, max_pixels: int, max_aspect: int) -> None:
    if width * height > max_pixels:
        raise TooLargeError(
            f"the image has {width:,} x {height:,} = {width * height:,} pixels; "
            f"at most {max_pixels:,} are allowed"
        )
    if max(width, height) > max_aspect * min(width, height):
        raise ImageError(
            f"the image is {width:,} x {height:,} pixels; its sides may differ by a factor of "
            f"{max_aspect} at most"
        )
