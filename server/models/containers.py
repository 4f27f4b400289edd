"""How much an image file holds beside its pixels, counted before a decoder sees the file.

Pillow goes through metadata one segment after the other in Python, and libjpeg through all of
the picture in each scan, so that a small file made of nothing else would keep a thread busy for
a minute. The headers of the segments alone are read here. What is malformed is left to the
decoder, which says so in its own words.
"""

import re
import struct

from server.errors import ImageError

#: Segments or chunks that are not the picture. Cameras write up to some dozens; 8 MiB of
#: metadata in JPEG segments of 64 kB are 128.
MAX_SEGMENTS = 512

#: Bytes of all of them. Colour profiles, depth maps and edit histories in XMP reach some MB.
MAX_METADATA = 8 * 2**20

#: Bytes between the segments of a JPEG, which decoders step over one by one; there should be none.
MAX_PADDING = 64 * 2**10

#: Chunks that the picture is cut into. Encoders write one for 8 kB or more, some one for a row.
MAX_PIECES = 65_536

#: Scans of a JPEG. Progressive ones have 10 or so; each costs 40 ms for 64 million pixels.
MAX_SCANS = 64

#: Tags in a directory of Exif or of a JPEG's further pictures. Cameras write some dozens.
MAX_TAGS = 512

#: The chunks that are the picture, or the frames of an animation.
_PNG_PICTURE = (b"IDAT", b"fcTL", b"fdAT")
_WEBP_PICTURE = (b"VP8 ", b"VP8L", b"VP8X", b"ALPH", b"ANIM", b"ANMF")

#: What other files begin with, and what they are called.
_SIGNATURES = {
    b"GIF8": "GIF",
    b"BM": "BMP",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
    b"%PDF-": "PDF",
    b"\xff\x0a": "JPEG XL",
    b"\0\0\0\x0cJXL ": "JPEG XL",
    b"\0\0\0\x0cjP  ": "JPEG 2000",
}
#: The first brand of an ISO base media file, which phones keep pictures in.
_BRANDS = {
    **dict.fromkeys((b"avif", b"avis"), "AVIF"),
    **dict.fromkeys((b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx"), "HEIC"),
    b"mif1": "HEIF",
}

# Markers of a JPEG. Any number of 0xFF may precede one; 0xFF 0x00 is a 0xFF of the data.
_MARKER = re.compile(rb"\xff[\x01-\xfe]")
_MARKER_AFTER_SCAN = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")  # restarts are part of a scan
_WITHOUT_LENGTH = {0x01, *range(0xD0, 0xDA), 0xC8, *range(0xF0, 0xFE)}
_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
_APP1, _APP2, _END, _SCAN = 0xE1, 0xE2, 0xD9, 0xDA


def other_format(data: bytes | bytearray) -> str | None:
    """Return what a file that is not read here is, by its first bytes; None: it is not known."""
    if data[4:8] == b"ftyp":
        return _BRANDS.get(bytes(data[8:12]))
    return next((name for start, name in _SIGNATURES.items() if data.startswith(start)), None)


def check_container(data: bytes | bytearray) -> None:
    """Check that a JPEG, PNG or WebP file has no more than its share of what is not pixels.

    Raises:
        ImageError: naming what there is too much of, and how much is allowed.
    """
    try:
        if data.startswith(b"\xff\xd8\xff"):
            _check_jpeg(data)
        elif data.startswith(b"\x89PNG\r\n\x1a\n"):
            _check_chunks(data, 8, ">I4s", _PNG_PICTURE)
        elif data.startswith(b"RIFF") and data[8:12] == b"WEBP":
            _check_chunks(data, 12, "<4sI", _WEBP_PICTURE)
    except (struct.error, IndexError):
        return  # truncated


def check_tags(block: bytes | bytearray) -> None:
    """Check that the first directory of an Exif block, or of a similar one, is not too long.

    Raises:
        ImageError: if it has more than `MAX_TAGS` tags.
    """
    tiff = re.sub(rb"^(Exif\0\0){1,2}", b"", block)
    order = {b"II": "<", b"MM": ">"}.get(tiff[:2])
    if order is None or len(tiff) < 8:
        return
    (at,) = struct.unpack_from(f"{order}I", tiff, 4)
    if at + 2 <= len(tiff):
        (tags,) = struct.unpack_from(f"{order}H", tiff, at)
        _bound(tags, MAX_TAGS, "tags in one directory of metadata")


def _bound(found: int, allowed: int, what: str) -> None:
    if found > allowed:
        raise ImageError(f"the image has {found:,} {what}; at most {allowed:,} are allowed")


class _Count:
    """What a file was found to hold so far; each method fails once that is too much."""

    def __init__(self) -> None:
        self._segments = self._metadata = self._pieces = 0

    def segment(self, size: int) -> None:
        self._segments += 1
        self._metadata += size
        _bound(self._segments, MAX_SEGMENTS, "segments of metadata or more")
        _bound(self._metadata, MAX_METADATA, "bytes of metadata or more")

    def piece(self) -> None:
        self._pieces += 1
        _bound(self._pieces, MAX_PIECES, "chunks of picture or more")


def _check_chunks(
    data: bytes | bytearray, at: int, header: str, picture: tuple[bytes, ...]
) -> None:
    """Count the chunks of a PNG or a WebP file, of which the first begins at `at`."""
    count, png = _Count(), header == ">I4s"
    while at + 8 <= len(data):
        first, second = struct.unpack_from(header, data, at)
        size, kind = (first, second) if png else (second, first)
        if kind == b"IEND":
            return
        if kind in picture:
            count.piece()
        else:
            count.segment(size)
        # A PNG's chunks end with a checksum; those of WebP have even sizes.
        at += 8 + (size + 4 if png else size + size % 2)


def _check_jpeg(data: bytes | bytearray) -> None:
    """Count the segments of a JPEG up to its picture, then the scans of that."""
    count, at, padding = _Count(), 2, 0
    exif = []
    components, sequential = 0, True
    while found := _MARKER.search(data, at):
        padding += found.start() - at
        _bound(padding, MAX_PADDING, "bytes or more between its segments")
        marker, at = data[found.end() - 1], found.end()
        size = 0 if marker in _WITHOUT_LENGTH else max(2, *struct.unpack_from(">H", data, at))
        count.segment(size)
        if marker in _FRAMES:
            components, sequential = data[at + 7], marker % 4 != 2
        elif marker == _APP1 and data.startswith(b"Exif\0\0", at + 2):
            exif.append(data[at + 8 : at + size])  # Pillow joins them
        elif marker == _APP2 and data.startswith(b"MPF\0", at + 2):
            check_tags(data[at + 6 : at + size])
        elif marker == _SCAN:
            check_tags(b"".join(exif))
            # Of a picture in one scan nothing that follows is read.
            if not (sequential and data[at + 2] == components):
                _check_scans(data, at + size, count)
            return
        at += size


def _check_scans(data: bytes | bytearray, at: int, count: _Count) -> None:
    """Count the scans of a JPEG, of which the first one's data begins at `at`."""
    scans = 1
    while found := _MARKER_AFTER_SCAN.search(data, at):
        marker, at = data[found.end() - 1], found.end()
        if marker == _END:
            return
        if marker == _SCAN:
            scans += 1
            _bound(scans, MAX_SCANS, "scans or more")
        size = 0 if marker in _WITHOUT_LENGTH else max(2, *struct.unpack_from(">H", data, at))
        count.segment(size)
        at += size
