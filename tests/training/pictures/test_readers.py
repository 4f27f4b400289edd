import os
from pathlib import Path

import pytest

from tests.training.pictures.files import colours, labels, opened, png, write_tar
from tocom import DataError
from training.pictures.sets import class_names


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


def write_shards(root: Path, classes: dict[str, bytes]) -> None:
    """Write two shards of pictures of grey level 0, 1, ... and the .cls files of some."""
    for shard in range(2):
        files = {}
        for i in (2 * shard, 2 * shard + 1):
            files[f"{i:04}.png"] = png(i)
            if content := classes.get(f"{i:04}"):
                files[f"{i:04}.cls"] = content
            files[f"{i:04}.json"] = b"{}"
        write_tar(root / f"train-{shard:06}.tar", files)


def test_classes_of_a_web_data_set_are_in_its_cls_files(tmp_path: Path) -> None:
    write_shards(tmp_path, {"0000": b"2", "0001": b"0", "0002": b"2\n", "0003": b"10"})
    shards = opened(tmp_path)
    assert (colours(shards), labels(shards)) == ([0, 1, 2, 3], [2, 0, 2, 10])
    assert class_names(shards) == [str(number) for number in range(11)]
    one = opened(tmp_path / "train-000001.tar")
    assert (colours(one), labels(one)) == ([2, 3], [2, 10])
    (tmp_path / "classes.txt").write_text("\n".join("abcdefghijk"))
    assert class_names(opened(tmp_path)) == class_names(opened(one.path)) == [*"abcdefghijk"]


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ({}, r"train-000000\.tar/0000\.png is in no class folder and has no \.cls file"),
        ({"0000": b"0", "0003": b"1"}, r"train-000000\.tar/0001\.png has no \.cls file"),
        (
            {"0000": b"0", "0001": b"0", "0002": b"cat", "0003": b"1"},
            r"\.cls file of train-000001\.tar/0002\.png must hold the number.*got b'cat'",
        ),
    ],
)
def test_shards_without_classes_can_be_read_and_not_trained_for(
    tmp_path: Path, classes: dict[str, bytes], message: str
) -> None:
    write_shards(tmp_path, classes)
    shards = opened(tmp_path)
    assert (colours(shards), labels(shards)) == ([0, 1, 2, 3], [-1] * 4)
    with pytest.raises(DataError, match=f"{tmp_path} has no classes: .*{message}"):
        class_names(shards)


def test_nothing_is_written_beside_the_tars(tmp_path: Path) -> None:
    write_tar(tmp_path / "large.tar", {"a/0.png": png(5)})
    os.truncate(tmp_path / "large.tar", 11 * 2**30)  # sparse; timm keeps an index from 10 GB
    assert colours(opened(tmp_path / "large.tar")) == colours(opened(tmp_path)) == [5]
    assert [path.name for path in tmp_path.iterdir()] == ["large.tar"]


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
