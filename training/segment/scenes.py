"""Pictures with a label for every pixel: `SPLIT/images/NAME.jpg` and `SPLIT/labels/NAME.png`.

In a folder or a .tar, which is read without unpacking. Labels are images with a byte a pixel.
"""

import io
import posixpath
import tarfile
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

import numpy as np
from PIL import Image
from timm.data.readers.img_extensions import get_img_extensions
from timm.utils.misc import natural_key
from torch import Tensor

from adapters.segmentation.task import Colour, usual_palette
from tocom import ConfigError, DataError
from training.pictures.batches import Pictures, seed_augmentation
from training.pictures.readers import lines_of, places
from training.pictures.sampler import Draw
from training.segment.config import ScenesConfig
from training.segment.metrics import IGNORED

#: Stands for a label that no class has.
_UNKNOWN = -1


class Classes(NamedTuple):
    """What the labels of scenes mean."""

    names: tuple[str, ...]
    palette: tuple[Colour, ...]
    of_label: Any  # [256] the class of each label, `IGNORED` or `_UNKNOWN`
    first: int  # label of the first class
    ignored: tuple[int, ...]  # labels


class Scene(NamedTuple):
    """A picture and the class of each of its pixels."""

    picture: Image.Image
    labels: Image.Image  # of mode L


def classes_of(config: ScenesConfig) -> Classes:
    """Return the classes of scenes.

    Raises:
        ConfigError, DataError: if nobody says which there are, or it does not fit together.
    """
    names = config.classes
    if names is None:
        root = Path(config.path)
        file = (root if root.is_dir() else root.parent) / "classes.txt"
        if not file.is_file():
            raise ConfigError(
                f"scenes.classes is not given and there is no {file} that names the classes, a "
                "line each"
            )
        names = tuple(line.strip() for line in lines_of(file) if line.strip())
    elif isinstance(names, int):
        names = tuple(f"class {i}" for i in range(names))
    if not 1 <= len(names) <= IGNORED:
        raise ConfigError(
            f"labels have a byte a pixel, and {IGNORED} is ignored: 1 to {IGNORED} classes, got "
            f"{len(names)}"
        )
    palette = config.palette or usual_palette(len(names))
    if len(palette) != len(names):
        raise ConfigError(f"scenes.palette has {len(palette)} colours for {len(names)} classes")
    first, ignored = config.first or 0, (IGNORED,) if config.ignored is None else config.ignored
    of_label = np.full(256, _UNKNOWN)
    of_label[list(ignored)] = IGNORED
    for label, name in enumerate(names, start=first):
        if label > 255 or of_label[label] == IGNORED:
            raise ConfigError(
                f"the class {name!r} has the label {label}, which is ignored or more than a byte "
                "holds; see scenes.first and scenes.ignored"
            )
        of_label[label] = label - first
    return Classes(names, palette, of_label, first, ignored)


class SceneSet:
    """The scenes of one split, in the order of their names."""

    def __init__(self, config: ScenesConfig, split: str, classes: Classes) -> None:
        """Look for pictures and their labels.

        Raises:
            DataError: if there are none, or a picture has no labels.
        """
        self.root, self.path, self.classes = Path(config.path), f"{config.path}, {split}", classes
        self.places: dict[str, tuple[int, int]] | None = None
        if not self.root.exists():
            raise DataError(f"there are no scenes at {config.path}")
        if self.root.is_file():
            try:
                self.places = places(self.root)
            except tarfile.TarError as error:
                raise DataError(f"{config.path} is no .tar that can be read: {error}") from error
        kinds = get_img_extensions(as_set=True)
        images = posixpath.join(split, "images")
        names = [name for name in self._under(images) if Path(name).suffix.lower() in kinds]
        labels = {_stem(name): name for name in self._under(posixpath.join(split, "labels"))}
        self.scenes = []
        for name in sorted(names, key=natural_key):
            key = posixpath.join(split, "labels", posixpath.relpath(_stem(name), images))
            if key not in labels:
                raise DataError(f"{name} of {config.path} has no labels: there is no {key}.png")
            self.scenes.append((name, labels[key]))
        if not self.scenes:
            raise DataError(
                f"{config.path} has no pictures in {images}/, whose labels are in {split}/labels/"
            )

    def __len__(self) -> int:
        """Return the number of scenes."""
        return len(self.scenes)

    def read(self, index: int) -> Scene:
        """Decode a scene.

        Raises:
            DataError: if it cannot be read, or its labels do not fit.
        """
        name, labels_name = self.scenes[index]
        picture = self._image(name)
        if picture.mode != "RGB":
            picture = picture.convert("RGB")
        labels = self._image(labels_name)
        if labels.size != picture.size:
            raise DataError(
                f"{labels_name} of {self.path} has {_pixels(labels)} pixels, and its picture "
                f"{name} {_pixels(picture)}"
            )
        if labels.mode not in ("1", "L", "P"):
            raise DataError(
                f"{labels_name} of {self.path} must have a byte a pixel, grey or with a palette, "
                f"got an image of mode {labels.mode}"
            )
        of_pixels = self.classes.of_label[np.asarray(labels).astype(np.uint8)]
        if (of_pixels == _UNKNOWN).any():
            value = int(np.asarray(labels)[of_pixels == _UNKNOWN][0])
            first, last = self.classes.first, self.classes.first + len(self.classes.names) - 1
            ignored = ", ".join(map(str, self.classes.ignored)) or "none"
            raise DataError(
                f"{labels_name} of {self.path} has the label {value}; classes are {first} to "
                f"{last}, ignored are {ignored} (scenes.ignored)"
            )
        return Scene(picture, Image.fromarray(of_pixels.astype(np.uint8)))

    def forget_files(self) -> None:
        """Nothing: each file is opened anew."""

    def _under(self, folder: str) -> list[str]:
        if self.places is not None:
            return [name for name in self.places if name.startswith(f"{folder}/")]
        found = (self.root / folder).rglob("*")
        return [path.relative_to(self.root).as_posix() for path in found if path.is_file()]

    def _open(self, name: str) -> BinaryIO:
        if self.places is None:
            return (self.root / name).open("rb")
        start, size = self.places[name]
        with self.root.open("rb") as tar:
            tar.seek(start)
            return io.BytesIO(tar.read(size))

    def _image(self, name: str) -> Image.Image:
        try:
            with self._open(name) as file, Image.open(file) as image:
                image.load()
                return image.copy()
        except Exception as error:  # a broken file makes PIL's decoders raise anything
            raise DataError(f"{name} of {self.path} cannot be read: {error}") from error


class Scenes(Pictures):
    """The scenes of a split under one transform of both, asked for by `Draw`.

    An item is the picture, its labels and 0, the number that were passed over.
    """

    def __init__(
        self,
        scenes: SceneSet,
        transform: Any,
        on_unreadable: Literal["stop", "skip"] = "stop",
    ) -> None:
        """Take a split; the arguments are those of `Pictures`."""
        self.scenes, self.parts = scenes, [scenes]  # type: ignore[list-item]
        self.transform, self.on_unreadable = transform, on_unreadable
        self.held_out = frozenset()

    def __getitem__(self, draw: Draw) -> tuple[Tensor, Tensor, int]:
        """Return the transformed picture [3, H, W], its labels [H, W] and how many passed over.

        Raises:
            DataError: if it cannot be read and shall not be passed over, or if none can.
        """
        scene, _, skipped = self._read(draw)
        seed_augmentation(draw)
        return *self.transform(scene), skipped

    def _decoded(self, part: Any, index: int) -> Any:
        return part.read(index), 0


def _stem(name: str) -> str:
    return posixpath.splitext(name)[0]


def _pixels(image: Image.Image) -> str:
    return f"{image.height} x {image.width}"
