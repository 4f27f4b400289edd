"""Readers of pictures by number: .tar files, and list files."""

import io
import posixpath
import tarfile
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from timm.data.readers.reader import Reader
from timm.data.readers.reader_image_in_tar import ReaderImageInTar
from timm.utils.misc import natural_key
from torch import Tensor

from tocom import DataError


class TarReader(ReaderImageInTar):  # type: ignore[misc]
    """timm's reader of a .tar or of a folder of them.

    Classes are the folders in the tars; or, in the shards of a WebDataset, the numbers in the
    `.cls` files beside the pictures, which a file classes.txt beside the tars may name.

    Attributes:
        unlabelled: why the pictures have no classes; empty if they have.
    """

    samples: Any
    targets: Any

    def __init__(self, root: str) -> None:
        """Look for pictures in all tars of `root`."""
        # timm would keep its index beside large tars: every process at the same moment, and
        # without ever comparing it with the tars again. A read-only folder has no place for it.
        super().__init__(root, cache_tarinfo=False)
        # timm leaves pictures of the same name in the order in which the disk lists their tars.
        order = sorted(range(len(self.samples)), key=lambda i: natural_key(self._filename(i)))
        self.samples, self.targets = self.samples[order], self.targets[order]
        self.class_to_idx, self.unlabelled = self.class_name_to_idx, ""
        try:
            self._label()
        except DataError as error:  # is told to those who want classes; the others need none
            self.class_to_idx, self.unlabelled = {}, str(error)
            self.targets = np.full(len(self.samples), -1)

    def _label(self) -> None:
        """Take the classes from .cls files, if there are any.

        Raises:
            DataError: if a picture has no class. timm would take the tar for it, which is a shard.
        """
        root = Path(self.root)
        tars = {
            tar: _class_files(root / (tar or "")) for tar in {tar for _, tar, _ in self.samples}
        }
        if any(tars.values()):
            labels = [
                _class_number(tars[tar].get(_key(member.name)), self._filename(i))
                for i, (member, tar, _) in enumerate(self.samples)
            ]
            beside = (root.parent if self.root_is_tar else root) / "classes.txt"
            names = _class_names(beside, 1 + max(labels), self.root)
            self.targets = np.array(labels)
            self.class_to_idx = {name: i for i, name in enumerate(names)}
        elif not self.root_is_tar:
            for i, (member, _, inner) in enumerate(self.samples):
                if inner is None and posixpath.dirname(member.name) in ("", "."):
                    raise DataError(
                        f"{self._filename(i)} is in no class folder and has no .cls file beside it"
                    )

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
    classes.txt beside the list names them, a line each. Where a picture has several, a line is
    `relative/path class,class,...`, or `-` for none of them.
    """

    def __init__(self, root: Path, file: Path, many: bool = False) -> None:
        """Read the list.

        Args:
            root: a folder or a .tar.
            file: the list.
            many: whether a picture has several classes.

        Raises:
            DataError: naming the line, if it is not what it should be.
        """
        super().__init__()
        self.root, self.many = root, many
        self.samples = [
            _parse(line, f"{file}:{number}", many)
            for number, line in enumerate(lines_of(file), start=1)
            if line.strip()
        ]
        if not self.samples:
            raise DataError(f"{file} names no pictures")
        self.places = places(root) if root.is_file() else None
        for name, _ in self.samples:
            if not ((root / name).is_file() if self.places is None else name in self.places):
                raise DataError(f"{file} names {name}, which is not in {root}")
        count = 1 + max((label for _, labels in self.samples for label in labels), default=-1)
        if not count:
            raise DataError(f"{file} names no classes")
        names = _class_names(file.with_name("classes.txt"), count, file.name)
        self.class_to_idx = {name: i for i, name in enumerate(names)}

    def __len__(self) -> int:
        """Return the number of pictures."""
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[BinaryIO, int | Tensor]:
        """Return the open file and its class; of several [C], 1 for each that it has."""
        name, labels = self.samples[index]
        label: int | Tensor
        if self.many:
            label = torch.zeros(len(self.class_to_idx))
            label[list(labels)] = 1
        else:
            (label,) = labels
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


def _class_names(file: Path, count: int, of: str) -> list[str]:
    """Return the names of classes, a line each in `file`; their numbers, if there is no such file.

    Raises:
        DataError: if it names fewer than the `count` classes of the set `of`.
    """
    if not file.is_file():
        return [str(label) for label in range(count)]
    names = [line.strip() for line in lines_of(file) if line.strip()]
    if len(names) < count or len(set(names)) < len(names):
        raise DataError(
            f"{file} names {len(set(names))} different classes in {len(names)} lines; "
            f"{of} needs {count}"
        )
    return names


def _class_files(tar: Path) -> dict[str, bytes]:
    """Return the content of the .cls files in `tar` by what WebDataset calls their sample."""
    with tarfile.open(tar, "r:") as opened:
        return {
            _key(member.name): file.read()
            for member in opened
            if member.name.endswith(".cls") and (file := opened.extractfile(member))
        }


def _key(name: str) -> str:
    """Return the path up to the first dot of the file's name, which all files of a sample share."""
    folder, base = posixpath.split(name)
    return posixpath.join(folder, base.partition(".")[0])


def _class_number(content: bytes | None, picture: str) -> int:
    if content is None:
        raise DataError(f"{picture} has no .cls file beside it, as other pictures have")
    if not content.strip().isdigit():
        raise DataError(
            f"the .cls file of {picture} must hold the number of a class, got {content[:20]!r}"
        )
    return int(content)


def lines_of(file: Path) -> list[str]:
    """Return the lines of a text file.

    Raises:
        DataError: if it cannot be read.
    """
    try:
        return file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file} cannot be read: {error}") from error


def _parse(line: str, where: str, many: bool) -> tuple[str, tuple[int, ...]]:
    """Return (path, classes) of a line."""
    path, label = line.rsplit(maxsplit=1) if len(line.split()) > 1 else (line, "")
    labels = [] if many and label == "-" else label.split(",") if many else [label]
    if not all(each.isascii() and each.isdigit() for each in labels):
        form = "relative/path class,class,..." if many else "relative/path class"
        raise DataError(f"{where}: a line is `{form}`, class a number; got {line!r}")
    path = posixpath.normpath(path.strip())
    if posixpath.isabs(path) or path.split("/")[0] == "..":
        raise DataError(f"{where}: a path stays below the folder or .tar; got {path!r}")
    return path, tuple(map(int, labels))


def places(tar: Path) -> dict[str, tuple[int, int]]:
    """Return (first byte, bytes) of every file in `tar`."""
    with tarfile.open(tar, "r:") as opened:
        return {
            posixpath.normpath(member.name): (member.offset_data, member.size)
            for member in opened
            if member.isreg()
        }
