import io
import re
import struct
import warnings
import zlib
from contextlib import contextmanager, suppress

import numpy as np
import pytest
from PIL import Image, ImageFile

from server.errors import BadRequestError, ImageError, TooLargeError, UnsupportedTypeError
from server.models import pictures
from server.models.budget import PixelBudget
from server.models.pictures import decoding, prepare
from tests.server.conftest import picture, png

LIMIT = 1_000_000


def encoded(image: Image.Image, kind: str, **arguments: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **arguments)
    return buffer.getvalue()


def decode(data: bytes, max_pixels: int) -> Image.Image:
    with decoding(data, max_pixels) as image:
        return image


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
        b"\0\0\0\x18ftypmp42\0\0\0\0mp42isom",
    ],
)
def test_other_content_is_refused_whatever_it_is_called(data):
    with pytest.raises(UnsupportedTypeError, match="not a JPEG, PNG or WebP image"):
        decode(data, LIMIT)


def brand(name: bytes) -> bytes:
    """The beginning of an ISO base media file."""
    return b"\0\0\0\x18ftyp" + name + bytes(12)


@pytest.mark.parametrize(
    ("data", "kind", "file"),
    [
        (encoded(picture(0).convert("P"), "GIF"), "GIF", "'photo.gif[0]'"),
        (encoded(picture(0), "TIFF"), "TIFF", "'photo.tiff[0]'"),
        (encoded(picture(0), "BMP"), "BMP", "photo.bmp"),
        (brand(b"avif"), "AVIF", "photo.avif"),
        (brand(b"heic"), "HEIC", "photo.heic"),
        (brand(b"mif1"), "HEIF", "photo.heif"),
        (b"%PDF-1.7\n", "PDF", "'photo.pdf[0]'"),
        (b"\xff\x0a" + bytes(9), "JPEG XL", "photo.jxl"),
    ],
)
def test_a_known_format_is_named_with_what_to_do(data, kind, file):
    said = (
        f"the content is {kind}, not a JPEG, PNG or WebP image; convert it to JPEG or PNG, e.g. "
        f"`magick {file} photo.jpg`"
    )
    with pytest.raises(UnsupportedTypeError, match=f"^{re.escape(said)}$"):
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


@pytest.fixture
def happened(monkeypatch):
    """What is held, decoded and given back, in order."""
    events = []

    class Budget(PixelBudget):
        @contextmanager
        def hold(self, pixels, limit):
            events.append((pixels, limit))
            with super().hold(pixels, limit):
                yield
            events.append("given back")

    def tell(name):
        original = getattr(pictures, name)
        monkeypatch.setattr(pictures, name, lambda *args: (events.append(name), original(*args))[1])

    tell("_load")
    tell("transformed")
    monkeypatch.setattr(pictures, "DECODING", Budget())
    return events


def test_pixels_are_held_from_decoding_to_resizing(served, settings, happened):
    prepare(png(picture(0, 80, 64)), served, settings)
    assert happened == [(80 * 64, settings.max_pixels), "_load", "transformed", "given back"]


def test_a_picture_that_is_too_large_holds_nothing(served, settings, happened):
    with pytest.raises(TooLargeError, match="far more than"):
        prepare(huge_png(), served, settings)
    assert not happened


def test_a_picture_that_cannot_be_decoded_gives_its_pixels_back(served, settings, happened):
    data = png(picture(0, 400, 300))
    with pytest.raises(ImageError, match="cannot be decoded"):
        prepare(data[: len(data) // 2], served, settings)
    assert happened == [(400 * 300, settings.max_pixels), "_load"]
    assert pictures.DECODING._held == 0


@pytest.mark.parametrize(("progressive", "pixels"), [(False, 200 * 150), (True, 800 * 600)])
def test_a_jpeg_holds_what_it_is_reduced_to(progressive, pixels, served, settings, happened):
    data = encoded(picture(0, 800, 600), "JPEG", progressive=progressive)
    assert served.least_side in range(76, 150)
    prepare(data, served, settings)
    assert happened[0] == (pixels, settings.max_pixels)


def test_an_rgb_picture_is_not_copied(monkeypatch):
    data = png(picture(0))
    monkeypatch.setattr(Image.Image, "copy", None)
    monkeypatch.setattr(Image.Image, "convert", None)
    assert decode(data, LIMIT).size == (80, 64)


def test_what_another_picture_was_converted_from_is_freed(monkeypatch):
    closed = []
    original = ImageFile.ImageFile.close
    monkeypatch.setattr(
        ImageFile.ImageFile, "close", lambda self: (closed.append(self.mode), original(self))
    )
    decode(png(picture(0).convert("RGBA")), LIMIT)
    assert closed == ["RGBA"]
