import io
import struct
import warnings
import zlib
from contextlib import suppress

import numpy as np
import pytest
from PIL import Image

from server.errors import BadRequestError, ImageError, TooLargeError, UnsupportedTypeError
from server.models.pictures import decode
from tests.server.conftest import picture, png

LIMIT = 1_000_000


def encoded(image: Image.Image, kind: str, **arguments: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **arguments)
    return buffer.getvalue()


def huge_png(width: int = 30_000, height: int = 30_000) -> bytes:
    """A well-formed black PNG of 1 bit a pixel: about 100 kB for 900 million pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        crc = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", crc)

    packer = zlib.compressobj(9)
    row = bytes(1 + (width + 7) // 8)
    rows = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "JPEG"])
def test_formats(kind):
    image = picture(0)
    lossless = {"lossless": True} if kind == "WEBP" else {}
    decoded = decode(encoded(image, kind, **lossless), LIMIT)
    assert decoded.mode == "RGB"
    assert decoded.size == image.size
    difference = np.abs(np.asarray(decoded, dtype=int) - np.asarray(image, dtype=int))
    assert difference.max() == 0 if kind != "JPEG" else difference.mean() < 10


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA"])
def test_modes(mode):
    image = picture(0).convert(mode)
    decoded = decode(png(image), LIMIT)
    np.testing.assert_array_equal(np.asarray(decoded), np.asarray(image.convert("RGB")))


def test_a_palette_with_transparency():
    image = picture(0).convert("P")
    data = encoded(image, "PNG", transparency=bytes(range(256)))
    np.testing.assert_array_equal(np.asarray(decode(data, LIMIT)), np.asarray(image.convert("RGB")))


def test_16_bits_of_grey_keep_their_brightness():
    values = np.array([[0, 255, 256, 40_000, 65_535]], dtype=np.uint16)
    decoded = decode(png(Image.fromarray(values)), LIMIT)
    assert np.asarray(decoded)[0, :, 0].tolist() == [0, 0, 1, 156, 255]


def test_cmyk():
    image = picture(0)
    decoded = decode(encoded(image.convert("CMYK"), "JPEG", quality=95), LIMIT)
    difference = np.abs(np.asarray(decoded, dtype=int) - np.asarray(image, dtype=int))
    assert difference.mean() < 10


def test_an_animation_gives_its_first_frame():
    frames = [picture(i) for i in range(3)]
    data = encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True)
    np.testing.assert_array_equal(np.asarray(decode(data, LIMIT)), np.asarray(frames[0]))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_a_rotated_image_is_turned_upright(kind):
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: the camera was turned by a quarter
    data = encoded(picture(0, 80, 64), kind, exif=exif)
    assert decode(data, LIMIT).size == (64, 80)


def test_one_pixel():
    assert decode(png(Image.new("RGB", (1, 1), "red")), LIMIT).getpixel((0, 0)) == (255, 0, 0)


def test_no_bytes():
    with pytest.raises(BadRequestError, match="no bytes"):
        decode(b"", LIMIT)


@pytest.mark.parametrize(
    "data",
    [
        b"just a text\n" * 10,
        b"\x00",
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        encoded(picture(0).convert("P"), "GIF"),
        encoded(picture(0), "TIFF"),
        encoded(picture(0), "BMP"),
    ],
)
def test_other_content_is_refused_whatever_it_is_called(data):
    with pytest.raises(UnsupportedTypeError, match="not a JPEG, PNG or WebP image"):
        decode(data, LIMIT)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_a_truncated_image(kind):
    data = encoded(picture(0, 400, 300), kind)
    with pytest.raises(ImageError, match="cannot be decoded"):
        decode(data[: len(data) // 2], LIMIT)


def test_a_damaged_image():
    data = bytearray(png(picture(0, 400, 300)))
    data[len(data) // 2] ^= 0xFF
    with pytest.raises(ImageError, match="cannot be decoded"):
        decode(bytes(data), LIMIT)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_damage_anywhere_is_an_error_of_the_image_or_none(kind):
    data = encoded(picture(0), kind)
    random = np.random.default_rng(0)
    for _ in range(200):
        damaged = bytearray(data)
        for at in random.integers(0, len(data), 3):
            damaged[at] = random.integers(0, 256)
        with suppress(ImageError, TooLargeError, UnsupportedTypeError):
            decode(bytes(damaged), LIMIT)


def test_too_many_pixels_are_not_decoded():
    with pytest.raises(TooLargeError, match=r"2,000 x 1,000 = 2,000,000 .* at most 1,000,000"):
        decode(huge_png(2000, 1000), LIMIT)


def test_far_too_many_pixels_are_not_decoded():
    data = huge_png()
    assert len(data) < 150_000
    with pytest.raises(TooLargeError, match="far more than the 64,000,000 pixels"):
        decode(data, 64_000_000)


def test_what_pillow_only_warns_of_is_refused_too():
    data = huge_png(10_000, 10_000)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(TooLargeError, match="10,000 x 10,000"):
            decode(data, 64_000_000)


@pytest.mark.parametrize("size", [(20_000, 1), (1, 20_000), (1010, 10)])
def test_far_too_elongated(size):
    with pytest.raises(ImageError, match="by a factor of 100 at most"):
        decode(png(Image.new("RGB", size)), LIMIT)
