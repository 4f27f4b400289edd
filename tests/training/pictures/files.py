"""Sets of pictures of one colour each, in .tar files."""

import io
import tarfile
from pathlib import Path
from typing import Any

from PIL import Image

from training.pictures.config import PicturesConfig
from training.pictures.sets import PictureSet, open_pictures


def opened(path: Path | str, **more: Any) -> PictureSet:
    return open_pictures(PicturesConfig(path=str(path), **more))


def png(colour: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (colour, 0, 0)).save(file, "PNG")
    return file.getvalue()


def write_tar(path: Path, files: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def colours(pictures: PictureSet) -> list[int]:
    return [pictures[i][0].getpixel((0, 0))[0] for i in range(len(pictures))]


def labels(pictures: PictureSet) -> list[int]:
    return [pictures[i][1] for i in range(len(pictures))]
