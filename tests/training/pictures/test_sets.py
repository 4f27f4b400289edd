import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import ExifTags, Image
from pydantic import ValidationError

from tests.training.pictures.files import colours, labels, opened, png, write_tar
from tocom import DataError
from training.pictures.config import PicturesConfig
from training.pictures.sets import class_names


def test_class_folders_a_tar_and_shards_are_the_same_pictures(
    pictures: Path, tmp_path: Path
) -> None:
    shards, folders = tmp_path / "shards", tmp_path / "folders"
    shards.mkdir()
    folders.mkdir()
    for name in ("blue", "green", "red"):
        (folders / name).symlink_to(pictures.parent / name)
        with tarfile.open(shards / f"{name}.tar", "w") as tar:
            tar.add(pictures.parent / name, arcname=name)
    whole = opened(pictures)
    assert len(whole) == 24
    for other in (opened(folders), opened(shards)):
        assert class_names(other) == class_names(whole) == ["blue", "green", "red"]
        assert labels(other) == labels(whole)
        for i in range(24):
            assert np.array_equal(np.asarray(other[i][0]), np.asarray(whole[i][0]))


def test_pictures_outside_of_folders_are_one_class(tmp_path: Path) -> None:
    (tmp_path / "flat").mkdir()
    for i in range(3):
        (tmp_path / "flat" / f"{i}.png").write_bytes(png(i))
    write_tar(tmp_path / "flat.tar", {f"{i}.png": png(i) for i in range(3)})
    for flat in (opened(tmp_path / "flat"), opened(tmp_path / "flat.tar")):
        assert colours(flat) == [0, 1, 2]
        assert labels(flat) == [0, 0, 0]
        assert class_names(flat) == [""]


def test_pictures_are_upright_and_as_bright_as_in_service(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6  # the camera was turned by a quarter
    Image.new("RGB", (80, 64), "red").save(tmp_path / "a.jpg", exif=exif)
    grey = Image.fromarray(np.full((8, 8), 0x7FFF, np.uint16))
    grey.save(tmp_path / "b.png")
    turned, of_16_bits = (opened(tmp_path)[i][0] for i in range(2))
    assert turned.size == (64, 80)
    assert of_16_bits.getpixel((0, 0)) == (127, 127, 127)


def test_tars_among_pictures_are_refused(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", {"a/0.png": png(5)})
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "0.png").write_bytes(png(1))
    with pytest.raises(DataError, match=r"holds \.tar files and also pictures \(b/0\.png\)"):
        opened(tmp_path)


def test_missing_empty_and_broken_sets_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there are no pictures at .*nowhere"):
        opened(tmp_path / "nowhere")
    with pytest.raises(DataError, match="holds no pictures that can be read: Found 0 images"):
        opened(tmp_path)
    (tmp_path / "broken.tar").write_bytes(b"no tar" * 200)
    (tmp_path / "a.jpg").write_bytes(png(1))
    write_tar(tmp_path / "empty.tar", {"readme.txt": b""})
    for name in ("broken.tar", "a.jpg", "empty.tar"):
        with pytest.raises(DataError, match=rf"{name} holds no pictures that can be read"):
            opened(tmp_path / name)


@pytest.mark.parametrize("path", ["wds/shards", "hfids/org/name", "tfds/imagenet2012"])
def test_readers_from_front_to_back_are_refused(path: str) -> None:
    with pytest.raises(DataError, match=rf"{path} can only be read from front to back.*shards"):
        opened(path)


# Hub data sets


class HubSet:
    """What timm asks of a data set of the package `datasets`."""

    def __init__(
        self, columns: tuple[str, str], names: list[str] | None, broken: bool = False
    ) -> None:
        self.column_names, self.broken = list(columns), broken
        kind = SimpleNamespace(names=names) if names else SimpleNamespace()
        self.info = SimpleNamespace(features={columns[0]: object(), columns[1]: kind}, splits=None)

    def cast_column(self, column: str, kind: object) -> "HubSet":
        if column not in self.column_names:
            raise ValueError(f"no column {column}")
        return self

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> dict[str, Any]:
        picture, label = self.column_names
        content = b"no picture" if self.broken else png(index)
        return {picture: {"bytes": content, "path": None}, label: [1, "text"][index]}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, HubSet]]:
    """A module `datasets` that knows the sets put in here."""
    sets: dict[str, HubSet] = {}
    module = ModuleType("datasets")
    module.__dict__["Image"] = lambda decode: object()
    module.__dict__["load_dataset"] = lambda name, split, cache_dir: sets[f"{name}:{split}"]
    reader = "timm.data.readers.reader_hfds"
    monkeypatch.setitem(sys.modules, "datasets", module)
    monkeypatch.delitem(sys.modules, reader, raising=False)
    yield sets
    sys.modules.pop(reader, None)


def test_hub_data_set(hub: dict[str, HubSet]) -> None:
    hub["org/Name:test"] = HubSet(("image", "label"), ["ape", "bee"])
    found = opened("hfds/org/Name", split="test")
    assert (colours(found), labels(found)) == ([0, 1], [1, -1])  # text is no number of a class
    assert class_names(found) == ["ape", "bee"]
    hub["org/cifar:test"] = HubSet(("img", "fine_label"), None)
    found = opened("hfds/org/cifar", split="test", columns=("img", "fine_label"))
    assert colours(found) == [0, 1]
    with pytest.raises(DataError, match="no names of classes: its column 'fine_label' is no Class"):
        class_names(found)


def test_hub_data_set_that_cannot_be_opened(hub: dict[str, HubSet]) -> None:
    hub["org/cifar:test"] = HubSet(("img", "fine_label"), None)
    with pytest.raises(DataError, match="hfds/org/cifar has no column label; .* img, fine_label"):
        opened("hfds/org/cifar", split="test", columns=("img", "label"))
    with pytest.raises(DataError, match=r"\(split test, columns image, label\) cannot be opened"):
        opened("hfds/org/cifar", split="test")
    with pytest.raises(DataError, match=r"hfds/org/else \(split test.* cannot be opened"):
        opened("hfds/org/else", split="test")


def test_unreadable_picture_of_a_hub_data_set_is_named_by_number(hub: dict[str, HubSet]) -> None:
    hub["org/name:test"] = HubSet(("image", "label"), ["a", "b"], broken=True)
    found = opened("hfds/org/name", split="test")
    with pytest.raises(
        DataError, match="picture 1 of hfds/org/name cannot be read: it is no picture"
    ):
        found[1]


def test_hub_needs_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match="hfds/org/name needs the package datasets: pip install"):
        opened("hfds/org/name", split="train")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"path": "hfds/org/name"}, "needs a split and takes no list"),
        ({"path": "hfds/org/name", "split": "a", "list": "b"}, "needs a split and takes no list"),
        ({"path": "folder", "split": "train"}, "folder is no hub data set .* no split 'train'"),
    ],
)
def test_split_is_of_hub_data_sets_and_list_of_the_others(
    values: dict[str, str], message: str
) -> None:
    with pytest.raises(ValidationError, match=message):
        PicturesConfig.model_validate(values)


# Decoding


def break_(file: Path, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if how == "truncated":
        file.write_bytes(file.read_bytes()[:-300])
    elif how == "no picture":
        file.write_bytes(b"hello")
    elif how == "empty":
        file.write_bytes(b"")
    elif how == "vanished":
        file.unlink()
    else:
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("truncated", "truncated"),
        ("no picture", "it is no picture"),
        ("empty", "it is no picture"),
        ("vanished", "No such file"),
        ("bomb", "decompression bomb"),
    ],
)
def test_unreadable_picture_is_named_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str, reason: str
) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8)
    for i in range(2):
        Image.fromarray(noise).save(tmp_path / f"{i}.png")
    found = opened(tmp_path)
    break_(tmp_path / "1.png", how, monkeypatch)
    with pytest.raises(DataError, match=rf"1\.png of {tmp_path} cannot be read: .*{reason}"):
        found[1]


def test_large_jpegs_may_be_decoded_smaller(tmp_path: Path) -> None:
    small = np.random.default_rng(0).integers(0, 255, (15, 20, 3), dtype=np.uint8)
    photo = Image.fromarray(small).resize((400, 300), Image.Resampling.BICUBIC)
    for suffix in ("jpg", "png"):
        photo.save(tmp_path / f"a.{suffix}")
    found = opened(tmp_path)
    assert [found[i][0].size for i in range(2)] == [(400, 300)] * 2
    # A quarter keeps 75 pixels, an eighth would not.
    assert [found.read(i, 53)[0].size for i in range(2)] == [(100, 75), (400, 300)]
    assert found.read(0, 301)[0].size == (400, 300)
    # Resized to what a crop needs, they are the same picture: a grey level, of 255, apart.
    whole, quick = (picture.resize((53, 53)) for picture in (found[0][0], found.read(0, 53)[0]))
    assert np.abs(np.asarray(whole, float) - np.asarray(quick, float)).mean() < 1
