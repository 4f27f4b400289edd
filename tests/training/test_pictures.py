import io
import os
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from tocom import DataError
from training.config import PicturesConfig
from training.pictures import PictureSet, class_names, open_pictures


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


def test_shards_of_a_web_data_set_are_read_in_the_order_of_their_names(tmp_path: Path) -> None:
    for shard in (10, 2, 1):
        files = {}
        for i in range(2):
            files[f"{i}.png"] = png(10 * shard + i)
            files[f"{i}.cls"] = b"7"
        write_tar(tmp_path / f"shard-{shard}.tar", files)
    shards = opened(tmp_path)
    assert colours(shards) == [10, 11, 20, 21, 100, 101]
    assert shards.filename(2) == "shard-2.tar/0.png"


def test_pictures_outside_of_folders_are_one_class(tmp_path: Path) -> None:
    (tmp_path / "flat").mkdir()
    for i in range(3):
        (tmp_path / "flat" / f"{i}.png").write_bytes(png(i))
    write_tar(tmp_path / "flat.tar", {f"{i}.png": png(i) for i in range(3)})
    for flat in (opened(tmp_path / "flat"), opened(tmp_path / "flat.tar")):
        assert colours(flat) == [0, 1, 2]
        assert labels(flat) == [0, 0, 0]
        assert class_names(flat) == [""]


def test_nothing_is_written_beside_the_tars(tmp_path: Path) -> None:
    write_tar(tmp_path / "large.tar", {"a/0.png": png(5)})
    os.truncate(tmp_path / "large.tar", 11 * 2**30)  # sparse; timm keeps an index from 10 GB
    assert colours(opened(tmp_path / "large.tar")) == colours(opened(tmp_path)) == [5]
    assert [path.name for path in tmp_path.iterdir()] == ["large.tar"]


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


# List files


@pytest.fixture
def task(tmp_path: Path) -> Path:
    """A task in the layout of VTAB-1k, its pictures in a folder and in a .tar."""
    (tmp_path / "images").mkdir()
    files = {f"images/{i} of 4.png": png(i) for i in range(4)}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    write_tar(tmp_path / "images.tar", {f"./{name}": content for name, content in files.items()})
    (tmp_path / "test.txt").write_text("images/3 of 4.png 2\n\nimages/0 of 4.png\t0\n")
    return tmp_path


@pytest.mark.parametrize("root", [".", "images.tar"])
def test_list_names_the_pictures_of_a_folder_or_tar(task: Path, root: str) -> None:
    listed = opened(task / root, list="test.txt")
    assert (colours(listed), labels(listed)) == ([3, 0], [2, 0])
    assert class_names(listed) == ["0", "1", "2"]
    assert listed.filename(0) == "images/3 of 4.png"
    assert listed.filename(0, basename=True) == "3 of 4.png"
    (task / "classes.txt").write_text("ape\nbee\ncat\n")
    assert class_names(opened(task / root, list=str(task / "test.txt"))) == ["ape", "bee", "cat"]


@pytest.mark.parametrize("root", [".", "images.tar"])
@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("images/9.png 1", "test.txt names images/9.png, which is not in "),
        ("images/1 of 4.png", r"test.txt:1: a line is `relative/path class`.*got 'images/1 of"),
        ("images/1.png -1", "test.txt:1: a line is .* a number"),
        ("images/1.png ²", "test.txt:1: a line is .* a number"),
        ("7", "test.txt:1: a line is .*got '7'"),
        ("../secret.png 1", "test.txt:1: a path stays below the folder or .tar; got '../secret"),
        ("images/../../x.png 1", "test.txt:1: a path stays below"),
        ("/etc/x.png 1", "test.txt:1: a path stays below"),
        ("", "test.txt names no pictures"),
    ],
)
def test_mistakes_in_a_list_are_named(task: Path, root: str, line: str, message: str) -> None:
    (task / "test.txt").write_text(line.replace("images/1 of 4.png", "images/1 of four.png"))
    with pytest.raises(DataError, match=message):
        opened(task / root, list="test.txt")


def test_list_and_classes_must_fit(task: Path) -> None:
    with pytest.raises(DataError, match=r"nope\.txt cannot be read"):
        opened(task, list="nope.txt")
    (task / "test.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match=r"test\.txt cannot be read"):
        opened(task, list="test.txt")
    (task / "test.txt").write_text("images/3 of 4.png 2")
    (task / "classes.txt").write_text("ape\nbee\n")
    with pytest.raises(DataError, match="2 different classes in 2 lines; test.txt needs 3"):
        opened(task, list="test.txt")
    (task / "classes.txt").write_text("ape\nbee\nape\n")
    with pytest.raises(DataError, match="2 different classes in 3 lines; test.txt needs 3"):
        opened(task, list="test.txt")


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
