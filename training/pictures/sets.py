"""Sets of pictures, opened with timm's readers: folders, .tar files, hub data sets, list files.

Every set is read by number, so that a run resumes at any picture; readers that only go from
front to back (wds/, hfids/, tfds/) are refused. What timm does silently is an error here: it
takes the next picture where one cannot be read.
"""

import importlib
import numbers
import tarfile
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError
from timm.data import ImageDataset
from timm.data.readers import create_reader
from timm.data.readers.img_extensions import get_img_extensions
from torch import Tensor

from tocom import DataError
from tocom.pictures import in_rgb, turn_of
from training.pictures.config import PicturesConfig
from training.pictures.readers import ListReader, TarReader

_FRONT_TO_BACK = ("hfids", "tfds", "wds")


class PictureSet(ImageDataset):  # type: ignore[misc]  # timm ships no types
    """timm's data set of (PIL image in RGB, class), which names the picture it cannot read."""

    def __init__(self, path: str, reader: Any) -> None:
        """Take what `reader` reads; `path` is the set's name in messages."""
        super().__init__(path, reader=reader)
        self.path = path

    def __getitem__(self, index: int) -> tuple[Image.Image, Any]:
        """Return the picture in its full size and its class."""
        return self.read(index)

    def read(self, index: int, least_side: int | None = None) -> tuple[Image.Image, Any]:
        """Decode a picture: upright, as it is in service.

        Args:
            index: its number.
            least_side: a JPEG may come out at 1/2, 1/4 or 1/8 of its size, which decodes faster,
                as long as both sides keep so many pixels.

        Returns:
            The picture and its class, -1 where there is none; of a list with several classes a
            picture [C], 1 for each that it has.

        Raises:
            DataError: if it cannot be read.
        """
        try:
            file, label = self.reader[index]
            with file, Image.open(file) as image:
                if least_side is not None:
                    image.draft(None, (least_side, least_side))
                image.load()
                turn, picture = turn_of(image), in_rgb(image)
        except Exception as error:  # a broken file makes PIL's decoders raise anything
            name, reason = self._name(index), _reason(error)
            raise DataError(f"{name} of {self.path} cannot be read: {reason}") from error
        if turn is not None:
            picture = picture.transpose(turn)
        if isinstance(label, Tensor):
            return picture, label
        return picture, int(label) if isinstance(label, numbers.Integral) else -1

    def forget_files(self) -> None:
        """Close what is open: after a fork two processes would share the position they read at."""
        if isinstance(self.reader, TarReader):
            self.reader.forget_files()

    def _name(self, index: int) -> str:
        # A hub data set need not name its pictures, and asking it for the name reads the picture.
        hub = not hasattr(self.reader, "samples")
        return f"picture {index}" if hub else str(self.filename(index))


def open_pictures(pictures: PicturesConfig) -> PictureSet:
    """Open a set of pictures.

    - a folder of class folders, or of pictures alone; the innermost folder is the class
    - a .tar of the same, or a folder of such .tar files (shards, those of WebDataset too, whose
      `.cls` files say the classes)
    - with `list`: the pictures of a folder or .tar that a list file names
    - hfds/ORG/NAME with `split`: a data set of the Hugging Face hub, or hfds/FOLDER

    Raises:
        DataError: if there is nothing to read.
    """
    path = pictures.path
    kind = path.partition("/")[0]
    if kind != "hfds" and not Path(path).exists():
        if kind in _FRONT_TO_BACK:
            raise DataError(
                f"{path} can only be read from front to back, and a run that resumes needs its "
                "pictures by number; give a folder, a .tar, a folder of .tar shards (those of "
                "WebDataset too), a list file or hfds/ORG/NAME"
            )
        raise DataError(f"there are no pictures at {path}")
    try:
        return PictureSet(path, _hub(pictures) if kind == "hfds" else _local(pictures))
    except (AssertionError, OSError, RuntimeError, ValueError, tarfile.TarError) as error:
        raise DataError(f"{path} holds no pictures that can be read: {error}") from error


def class_names(pictures: PictureSet) -> list[str]:
    """Return the name of every class, in the order of their numbers.

    Raises:
        DataError: if the pictures have no classes, or a hub data set does not name them.
    """
    numbers_of: dict[str, int] = pictures.reader.class_to_idx
    if not numbers_of:
        if isinstance(pictures.reader, TarReader):
            raise DataError(f"{pictures.path} has no classes: {pictures.reader.unlabelled}")
        raise DataError(
            f"{pictures.path} has no names of classes: its column "
            f"{pictures.reader.label_key!r} is no ClassLabel"
        )
    return sorted(numbers_of, key=lambda name: numbers_of[name])


def _local(pictures: PicturesConfig) -> Any:
    path = Path(pictures.path)
    if pictures.list is not None:
        file = (path if path.is_dir() else path.parent) / pictures.list
        return ListReader(path, file, many=pictures.labels == "many")
    if path.is_file():
        return TarReader(str(path))
    if not any(path.glob("*.tar")):
        return create_reader("", root=str(path))
    kinds = get_img_extensions(as_set=True)
    if loose := next((file for file in path.rglob("*") if file.suffix.lower() in kinds), None):
        raise DataError(
            f"{path} holds .tar files and also pictures ({loose.relative_to(path)}); "
            "keep one of them there, or name one of the .tar files"
        )
    return TarReader(str(path))


def _hub(pictures: PicturesConfig) -> Any:
    try:
        importlib.import_module("datasets")
    except ImportError as error:
        raise DataError(
            f"{pictures.path} needs the package datasets: pip install datasets"
        ) from error
    picture, label = pictures.columns
    try:
        reader = create_reader(
            pictures.path, split=pictures.split, input_key=picture, target_key=label
        )
        missing = {picture, label} - set(reader.dataset.column_names)
    except Exception as error:  # of the hub, the network, the data set's files, ...
        asked = f"split {pictures.split}, columns {picture}, {label}"
        raise DataError(f"{pictures.path} ({asked}) cannot be opened: {error}") from error
    if missing:
        raise DataError(
            f"{pictures.path} has no column {', '.join(sorted(missing))}; `columns` may be two of "
            f"{', '.join(reader.dataset.column_names)}"
        )
    return reader


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):  # which prints the open file
        return "it is no picture that PIL knows"
    return str(error) or type(error).__name__
