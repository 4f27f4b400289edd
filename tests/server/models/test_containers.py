import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from server.errors import ImageError
from server.models import pictures
from server.models.containers import (
    MAX_METADATA,
    MAX_PADDING,
    MAX_PIECES,
    MAX_SCANS,
    MAX_SEGMENTS,
    MAX_TAGS,
    check_container,
)
from tests.server.conftest import picture, png
from tests.server.models.test_pictures import decode, encoded

LIMIT = 1_000_000

JPEG = encoded(picture(0), "JPEG")
PNG = png(picture(0))
WEBP = encoded(picture(0), "WEBP", exif=Image.Exif().tobytes())  # with a header that may have more
PROGRESSIVE = encoded(picture(0), "JPEG", progressive=True)


def segment(marker: int, content: bytes = b"") -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(content) + 2) + content


def in_jpeg(more: bytes, jpeg: bytes = JPEG) -> bytes:
    return jpeg[:2] + more + jpeg[2:]


def chunk(kind: bytes, content: bytes = b"") -> bytes:
    crc = zlib.crc32(kind + content)
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", crc)


def in_png(more: bytes) -> bytes:
    return PNG[:33] + more + PNG[33:]  # after the signature and the header


def in_webp(more: bytes) -> bytes:
    body = WEBP[8:] + more
    return b"RIFF" + struct.pack("<I", len(body)) + body


def tiff(tags: int) -> bytes:
    """A directory of tags, the last of which says that the camera was turned by a quarter."""
    entries = [struct.pack(">HHII", (0x0113 + i) % 65_536, 3, 1, 0) for i in range(tags - 1)]
    entries.append(struct.pack(">HHIHH", 0x0112, 3, 1, 6, 0))
    return b"MM\0*" + struct.pack(">IH", 8, tags) + b"".join(entries) + bytes(4)


def scans(count: int, between: bytes = b"") -> bytes:
    """A progressive JPEG whose last scan, with its table, comes again and again."""
    last = PROGRESSIVE.rindex(b"\xff\xc4", 0, PROGRESSIVE.rindex(b"\xff\xda"))
    more = count - PROGRESSIVE.count(b"\xff\xda")
    return PROGRESSIVE[:-2] + (between + PROGRESSIVE[last:-2]) * more + PROGRESSIVE[-2:]


def cut(pieces: int) -> bytes:
    """A PNG whose picture is in so many chunks, most of them empty."""
    at = PNG.index(b"IDAT") - 4
    return PNG[:at] + chunk(b"IDAT") * (pieces - PNG.count(b"IDAT")) + PNG[at:]


def raw_profile(block: bytes) -> bytes:
    text = f"\nexif\n{len(block):8}\n{block.hex()}\n".encode()
    return chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(text))


TOO_MUCH = {
    "segments": (in_jpeg(segment(0xE5) * (MAX_SEGMENTS + 1)), "513 segments .* at most 512"),
    "comments": (in_jpeg(segment(0xFE) * (MAX_SEGMENTS + 1)), "513 segments"),
    "tables": (in_jpeg(segment(0xDB) * (MAX_SEGMENTS + 1)), "513 segments"),
    "empty markers": (in_jpeg(b"\xff\xd0" * (MAX_SEGMENTS + 1)), "513 segments"),
    "bytes": (
        in_jpeg(segment(0xE1, bytes(65_533)) * 129),
        "bytes of metadata or more; at most 8,388,608",
    ),
    "padding": (in_jpeg(b"\xff" * (MAX_PADDING + 1)), "65,537 bytes or more between"),
    "junk": (in_jpeg(b"\xff\0" * MAX_PADDING), "131,072 bytes or more between"),
    "scans": (scans(MAX_SCANS + 1), "65 scans or more; at most 64"),
    "scans behind an end in a comment": (
        scans(MAX_SCANS + 1, segment(0xFE, b"\xff\xd9")),
        "65 scans or more",
    ),
    "segments between scans": (
        scans(MAX_SCANS, segment(0xFE) * MAX_SEGMENTS),
        "513 segments",
    ),
    "PNG chunks": (in_png(chunk(b"teSt") * MAX_SEGMENTS), "513 segments"),
    "PNG bytes": (in_png(chunk(b"teSt", bytes(MAX_METADATA))), "bytes of metadata or more"),
    "PNG pieces": (cut(MAX_PIECES + 1), "65,537 chunks of picture or more; at most 65,536"),
    "WebP chunks": (in_webp((b"TEST" + bytes(4)) * MAX_SEGMENTS), "513 segments"),
    "WebP bytes": (
        in_webp(b"TEST" + struct.pack("<I", MAX_METADATA) + bytes(MAX_METADATA)),
        "bytes of metadata or more",
    ),
    "tags": (
        in_jpeg(segment(0xE1, b"Exif\0\0" + tiff(MAX_TAGS + 1))),
        "513 tags in one directory of metadata; at most 512",
    ),
    "tags in two parts": (
        in_jpeg(
            segment(0xE1, b"Exif\0\0" + tiff(6000)[:40_000])
            + segment(0xE1, b"Exif\0\0" + tiff(6000)[40_000:])
        ),
        "6,000 tags",
    ),
    "tags of further pictures": (in_jpeg(segment(0xE2, b"MPF\0" + tiff(600))), "600 tags"),
}


@pytest.mark.parametrize(("data", "message"), TOO_MUCH.values(), ids=TOO_MUCH)
def test_too_much_beside_the_pixels_never_reaches_a_decoder(data, message, monkeypatch):
    opened = []
    monkeypatch.setattr(pictures.Image, "open", lambda *args, **_: opened.append(args))
    with pytest.raises(ImageError, match=message):
        decode(data, LIMIT)
    assert not opened


@pytest.mark.parametrize(
    "data",
    [
        in_png(chunk(b"eXIf", tiff(65_535))),
        in_png(raw_profile(b"Exif\0\0" + tiff(30_000))),
        in_png(chunk(b"tEXt", b"exif\0" + tiff(65_535))),
        encoded(picture(0), "WEBP", exif=tiff(65_535)),
    ],
    ids=["PNG", "PNG of ImageMagick", "PNG text", "WebP"],
)
def test_too_many_tags_are_not_parsed(data, monkeypatch):
    parsed = []
    monkeypatch.setattr(Image.Exif, "load", lambda *args: parsed.append(args))
    with pytest.raises(ImageError, match=r"(65,535|30,000) tags in one directory of metadata"):
        decode(data, LIMIT)
    assert not parsed


@pytest.mark.parametrize(
    ("data", "same_as"),
    [
        (in_jpeg(segment(0xE5) * 400 + segment(0xE1, bytes(65_533)) * 100), JPEG),
        (in_jpeg(b"\xff" * 1000), JPEG),
        (scans(MAX_SCANS), scans(MAX_SCANS - 1)),
        (JPEG + segment(0xDA) * 1000, JPEG),  # what follows a picture is not read
        (PROGRESSIVE + segment(0xDA) * 1000, PROGRESSIVE),
        (in_png(chunk(b"teSt") * 400 + chunk(b"teSt", bytes(7 * 2**20))), PNG),
        (cut(MAX_PIECES), PNG),
        (PNG + chunk(b"teSt") * 1000, PNG),
        (in_webp((b"TEST" + bytes(4)) * 400), WEBP),
    ],
    ids=[
        "JPEG", "JPEG with padding", "scans", "after a JPEG", "after a progressive JPEG", "PNG",
        "PNG in pieces", "after a PNG", "WebP",
    ],
)  # fmt: skip
def test_much_beside_the_pixels_is_read(data, same_as):
    np.testing.assert_array_equal(
        np.asarray(decode(data, LIMIT)), np.asarray(decode(same_as, LIMIT))
    )


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_nothing_is_said_of_what_is_cut_off(kind):
    data = {"JPEG": in_jpeg(segment(0xE1, b"Exif\0\0" + tiff(9)), PROGRESSIVE)}.get(
        kind, encoded(picture(0), kind, exif=tiff(9))
    )
    for length in range(len(data)):
        check_container(data[:length])


@pytest.mark.parametrize("orientation", range(10))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_pictures_are_turned_as_pillow_turns_them(kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    exif.get_ifd(0x8769)[0x9286] = b"a comment"
    data = encoded(picture(0, 80, 64), kind, exif=exif)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    np.testing.assert_array_equal(np.asarray(decode(data, LIMIT)), np.asarray(expected))


def test_metadata_is_read_where_imagemagick_wrote_them():
    block = b"Exif\0\0" + tiff(MAX_TAGS)
    assert decode(in_png(raw_profile(block)), LIMIT).size == (64, 80)


def test_a_picture_is_turned_without_writing_its_metadata(monkeypatch):
    monkeypatch.setattr(Image.Exif, "tobytes", None)
    assert decode(in_jpeg(segment(0xE1, b"Exif\0\0" + tiff(9))), LIMIT).size == (64, 80)
