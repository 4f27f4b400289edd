"""Sets of pictures, opened with timm's readers: folders, .tar files, hub data sets, list files.

Every set is read by number, so that a run resumes at any picture; readers that only go from
front to back (wds/, hfids/, tfds/) are refused. What timm does silently is an error here: it
takes the next picture where one cannot be read.
"""

import importlib
import io
import numbers
import posixpath
import tarfile
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image, UnidentifiedImageError
from timm.data import ImageDataset
from timm.data.readers import create_reader
from timm.data.readers.img_extensions import get_img_extensions
from timm.data.readers.reader import Reader
from timm.data.readers.reader_image_in_tar import ReaderImageInTar
from timm.utils.misc import natural_key

from tocom import DataError
from training.config import PicturesConfig

_FRONT_TO_BACK = ("hfids", "tfds", "wds")


class PictureSet(ImageDataset):  # type: ignore[misc]  # timm ships no types
    """timm's data set of (PIL image in RGB, class), which names the picture it cannot read."""

    def __init__(self, path: str, reader: Any) -> None:
        """Take what `reader` reads; `path` is the set's name in messages."""
        super().__init__(path, reader=reader)
        self.path = path

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        """Return the picture in its full size and its class."""
        return self.read(index)

    def read(self, index: int, least_side: int | None = None) -> tuple[Image.Image, int]:
        """Decode a picture.

        Args:
            index: its number.
            least_side: a JPEG may come out at 1/2, 1/4 or 1/8 of its size, which decodes faster,
                as long as both sides keep so many pixels.

        Returns:
            The picture and its class, -1 where there is none.

        Raises:
            DataError: if it cannot be read.
        """
        try:
            file, label = self.reader[index]
            with file, Image.open(file) as image:
                if least_side is not None:
                    image.draft(None, (least_side, least_side))
                picture = image.convert("RGB")
        except Exception as error:  # a broken file makes PIL's decoders raise anything
            name, reason = self._name(index), _reason(error)
            raise DataError(f"{name} of {self.path} cannot be read: {reason}") from error
        return picture, int(label) if isinstance(label, numbers.Integral) else -1

    def forget_files(self) -> None:
        """Close what is open: after a fork two processes would share the position they read at."""
        if isinstance(self.reader, TarReader):
            self.reader.forget_files()

    def _name(self, index: int) -> str:
        # A hub data set need not name its pictures, and asking it for the name reads the picture.
        hub = not hasattr(self.reader, "samples")
        return f"picture {index}" if hub else str(self.filename(index))


class TarReader(ReaderImageInTar):  # type: ignore[misc]
    """timm's reader of a .tar or of a folder of them.

    Classes are the folders in the tars or, for pictures outside of folders, the tars.
    """

    samples: Any
    targets: Any

    def __init__(self, root: str) -> None:
        """Look for pictures in all tars of `root`."""
        # timm would keep its index beside large tars: every process at the same moment, and
        # without ever comparing it with the tars again. A read-only folder has no place for it.
        super().__init__(root, cache_tarinfo=False)
        self.class_to_idx = self.class_name_to_idx
        # timm leaves pictures of the same name in the order in which the disk lists their tars.
        order = sorted(range(len(self.samples)), key=lambda i: natural_key(self._filename(i)))
        self.samples, self.targets = self.samples[order], self.targets[order]

    def forget_files(self) -> None:
        """Leave the open tars, to be opened anew."""
        states = [self.tar_state] if self.root_is_tar else list(self.tar_state.values())
        while states:
            state = states.pop()
            state.reset()
            states += state.children.values()

    def _filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        """Return the name in the tar, after the tar's own where there are several."""
        member, tar, _ = self.samples[index]
        return (
            posixpath.basename(member.name) if basename else posixpath.join(tar or "", member.name)
        )


class ListReader(Reader):  # type: ignore[misc]
    """Pictures that a list file names, a line `relative/path class` each.

    Paths are relative to a folder or to the root of a .tar; classes are numbers from 0. A file
    classes.txt beside the list names them, a line each.
    """

    def __init__(self, root: Path, file: Path) -> None:
        """Read the list.

        Raises:
            DataError: naming the line, if it is not what it should be.
        """
        super().__init__()
        self.root = root
        self.samples = [
            _parse(line, f"{file}:{number}")
            for number, line in enumerate(_lines(file), start=1)
            if line.strip()
        ]
        if not self.samples:
            raise DataError(f"{file} names no pictures")
        self.places = _places(root) if root.is_file() else None
        for name, _ in self.samples:
            if not ((root / name).is_file() if self.places is None else name in self.places):
                raise DataError(f"{file} names {name}, which is not in {root}")
        self.class_to_idx = {name: i for i, name in enumerate(self._classes(file))}

    def __len__(self) -> int:
        """Return the number of pictures."""
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[BinaryIO, int]:
        """Return the open file and its class."""
        name, label = self.samples[index]
        if self.places is None:
            return (self.root / name).open("rb"), label
        start, size = self.places[name]
        with self.root.open("rb") as tar:
            tar.seek(start)
            return io.BytesIO(tar.read(size)), label

    def _filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        name = self.samples[index][0]
        if absolute:
            return str(self.root / name)
        return posixpath.basename(name) if basename else name

    def _classes(self, file: Path) -> list[str]:
        count = 1 + max(label for _, label in self.samples)
        if not (named := file.with_name("classes.txt")).is_file():
            return [str(label) for label in range(count)]
        names = [line.strip() for line in _lines(named) if line.strip()]
        if len(names) < count or len(set(names)) < len(names):
            raise DataError(
                f"{named} names {len(set(names))} different classes in {len(names)} lines; "
                f"{file.name} needs {count}"
            )
        return names


def open_pictures(pictures: PicturesConfig) -> PictureSet:
    """Open a set of pictures.

    - a folder of class folders, or of pictures alone; the innermost folder is the class
    - a .tar of the same, or a folder of such .tar files (shards)
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
        DataError: if a hub data set does not say.
    """
    numbers_of: dict[str, int] = pictures.reader.class_to_idx
    if not numbers_of:
        raise DataError(
            f"{pictures.path} has no names of classes: its column "
            f"{pictures.reader.label_key!r} is no ClassLabel"
        )
    return sorted(numbers_of, key=lambda name: numbers_of[name])


def _local(pictures: PicturesConfig) -> Any:
    path = Path(pictures.path)
    if pictures.list is not None:
        return ListReader(path, (path if path.is_dir() else path.parent) / pictures.list)
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


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file} cannot be read: {error}") from error


def _parse(line: str, where: str) -> tuple[str, int]:
    """Return (path, class) of a line."""
    path, label = line.rsplit(maxsplit=1) if len(line.split()) > 1 else (line, "")
    if not (label.isascii() and label.isdigit()):
        raise DataError(f"{where}: a line is `relative/path class`, class a number; got {line!r}")
    path = posixpath.normpath(path.strip())
    if posixpath.isabs(path) or path.split("/")[0] == "..":
        raise DataError(f"{where}: a path stays below the folder or .tar; got {path!r}")
    return path, int(label)


def _places(tar: Path) -> dict[str, tuple[int, int]]:
    """Return (first byte, bytes) of every file in `tar`."""
    with tarfile.open(tar, "r:") as opened:
        return {
            posixpath.normpath(member.name): (member.offset_data, member.size)
            for member in opened
            if member.isreg()
        }
