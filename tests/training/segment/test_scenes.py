"""Scenes are read from folders and tars, and what does not fit is named."""

import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError

from tests.training.segment.conftest import NAMES
from tocom import ConfigError, DataError
from training.pictures.sampler import Draw
from training.segment.augment import SceneTransform, TestScene, TrainScene
from training.segment.config import SceneAugmentConfig, ScenesConfig
from training.segment.metrics import IGNORED
from training.segment.scenes import Scene, Scenes, SceneSet, classes_of


def config(path: Path, **changes: object) -> ScenesConfig:
    said = {"path": str(path), "classes": NAMES, "ignored": (9,)}
    return ScenesConfig.model_validate(said | changes)


def opened(path: Path, split: str = "train", **changes: object) -> SceneSet:
    said = config(path, **changes)
    return SceneSet(said, split, classes_of(said))


def test_a_tar_and_its_folder_hold_the_same_in_the_order_of_their_names(scenes: Path) -> None:
    one, other = opened(scenes), opened(scenes.with_suffix(""))
    assert len(one) == len(other) == 12
    assert [Path(name).stem for name, _ in one.scenes] == [str(i) for i in range(12)]
    for i in (0, 11):
        assert np.array_equal(np.asarray(one.read(i).picture), np.asarray(other.read(i).picture))
        labels = np.asarray(one.read(i).labels)
        assert np.array_equal(labels, np.asarray(other.read(i).labels))
        assert set(labels.ravel().tolist()) == {0, 1, 2, IGNORED}
        assert (labels[:2] == IGNORED).all()


def test_labels_may_begin_at_another_number(scenes: Path) -> None:
    shifted = opened(scenes, classes=("red", "blue"), first=1, ignored=(0, 9))
    labels, plain = (np.asarray(each.read(3).labels) for each in (shifted, opened(scenes)))
    assert (labels[plain == 1] == 0).all()
    assert (labels[plain == 2] == 1).all()
    assert (labels[plain == 0] == IGNORED).all()


def test_classes_may_be_named_by_a_file(scenes: Path, tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_text("a\nb\n")
    assert classes_of(config(tmp_path, classes=None)).names == ("a", "b")
    shutil.copy(scenes, tmp_path / "scenes.tar")
    assert classes_of(config(tmp_path / "scenes.tar", classes=None)).names == ("a", "b")
    assert classes_of(config(tmp_path, classes=2)).names == ("class 0", "class 1")
    with pytest.raises(ConfigError, match=r"there is no .*classes\.txt that names the classes"):
        classes_of(config(scenes, classes=None))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"palette": ((1, 2, 3),)}, "palette has 1 colours for 3 classes"),
        ({"ignored": (1,)}, "class 'red' has the label 1, which is ignored or more than"),
        ({"first": 254}, "class 'blue' has the label 256, which is ignored or more than a byte"),
    ],
)
def test_classes_that_do_not_fit_are_refused(scenes: Path, changes: dict, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        classes_of(config(scenes, **changes))


@pytest.mark.parametrize("classes", [0, 256, tuple(map(str, range(256)))])
def test_there_is_no_byte_for_256_classes_and_what_is_ignored(scenes: Path, classes: int) -> None:
    with pytest.raises(ValidationError, match="one of which is ignored: 1 to 255 classes"):
        config(scenes, classes=classes)


@pytest.fixture
def folder(scenes: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(scenes.with_suffix(""), tmp_path / "data"))


def test_labels_of_another_size_are_named(folder: Path) -> None:
    Image.new("L", (48, 39)).save(folder / "train" / "labels" / "1.png")
    with pytest.raises(DataError, match=r"labels/1\.png .* has 39 x 48 pixels, and its .* 40 x 48"):
        opened(folder).read(1)


def test_unknown_labels_are_named(folder: Path) -> None:
    Image.new("L", (48, 40), 7).save(folder / "train" / "labels" / "1.png")
    with pytest.raises(DataError, match="label 7; classes are 0 to 2, ignored are 9"):
        opened(folder).read(1)


def test_no_label_may_be_ignored(folder: Path) -> None:
    Image.new("L", (48, 40), 255).save(folder / "train" / "labels" / "1.png")
    with pytest.raises(DataError, match="label 255; classes are 0 to 2, ignored are none"):
        opened(folder, ignored=()).read(1)


def test_coloured_labels_are_refused(folder: Path) -> None:
    Image.new("RGB", (48, 40)).save(folder / "train" / "labels" / "1.png")
    with pytest.raises(DataError, match="a byte a pixel, grey or with a palette, got .* mode RGB"):
        opened(folder).read(1)
    path = folder / "train" / "labels" / "2.png"
    expected = np.asarray(opened(folder).read(2).labels)
    with Image.open(path) as opened_labels:
        labels = opened_labels.copy()
    labels.putpalette([0, 9, 18] * 256)
    labels.save(path)
    with Image.open(path) as written:
        assert written.mode == "P"
    assert np.array_equal(np.asarray(opened(folder).read(2).labels), expected)


def test_what_is_missing_is_named(folder: Path) -> None:
    (folder / "train" / "labels" / "1.png").unlink()
    with pytest.raises(DataError, match=r"1\.png of .* has no labels: .* train/labels/1\.png"):
        opened(folder)
    with pytest.raises(DataError, match="has no pictures in other/images/"):
        opened(folder, "other")
    with pytest.raises(DataError, match="there are no scenes at"):
        opened(folder / "none")
    (folder / "bad.tar").write_bytes(b"x" * 2000)
    with pytest.raises(DataError, match=r"is no \.tar that can be read"):
        opened(folder / "bad.tar")
    (folder / "test" / "images" / "0.png").write_bytes(b"x")
    with pytest.raises(DataError, match=r"images/0\.png of .* cannot be read"):
        opened(folder, "test").read(0)


def pair(height: int, width: int) -> Scene:
    """Return a scene whose picture shows its labels, in each channel."""
    labels = np.random.default_rng(0).integers(0, 200, (height // 8, width // 8), dtype=np.uint8)
    labels = labels.repeat(8, axis=0).repeat(8, axis=1)
    return Scene(Image.fromarray(np.stack([labels] * 3, axis=2)), Image.fromarray(labels))


@pytest.mark.parametrize("size", [(80, 96), (96, 64), (16, 16)])
def test_pictures_and_labels_are_changed_alike(size: tuple[int, int]) -> None:
    augment = SceneAugmentConfig(
        short_side=min(size), scale=(1, 1), crop=(32, 40), distort=False, most=1
    )
    transform = SceneTransform((0.5,) * 3, (1.0,) * 3, TrainScene(augment, (0.5, 0.5, 0.5)))
    for seed in range(6):
        random.seed(seed)
        picture, labels = transform(pair(*size))
        assert picture.shape == (3, 32, 40)
        assert labels.shape == (32, 40)
        inside = labels != IGNORED
        assert (picture[0][inside] == labels[inside]).all()
        assert (picture[:, ~inside] == 128).all()
        assert inside.sum() == min(32, size[0]) * min(40, size[1])


def test_scales_are_drawn_and_mirrored_half_of_the_time() -> None:
    augment = SceneAugmentConfig(short_side=16, scale=(0.5, 2), crop=(48, 48), distort=False)
    change, seen, mirrored = TrainScene(augment, (0.5, 0.5, 0.5)), [], 0
    labels = np.zeros((16, 16), np.uint8)
    labels[:, 8:] = 1
    for seed in range(60):
        random.seed(seed)
        changed = np.asarray(
            change(Scene(Image.new("RGB", (16, 16)), Image.fromarray(labels))).labels
        )
        there = changed != IGNORED
        seen.append(there.any(axis=1).sum())
        mirrored += changed[there][0] == 1
    assert 8 <= min(seen) < 12
    assert 28 < max(seen) <= 32
    assert 15 < mirrored < 45


def test_a_crop_of_one_class_is_tried_again() -> None:
    labels = np.zeros((64, 64), np.uint8)
    labels[:, 56:] = 1
    scene = Scene(Image.new("RGB", (64, 64)), Image.fromarray(labels))
    shares = []
    for most in (1, 0.75):
        augment = SceneAugmentConfig(
            short_side=64, scale=(1, 1), crop=(16, 16), most=most, distort=False
        )
        change, found = TrainScene(augment, (0.5, 0.5, 0.5)), 0
        for seed in range(40):
            random.seed(seed)
            found += (np.asarray(change(scene).labels) == 1).mean() >= 0.25
        shares.append(found)
    assert shares[1] > 2 * shares[0]


def test_the_same_draw_is_changed_in_the_same_way(scenes: Path) -> None:
    augment = SceneAugmentConfig(short_side=40, crop=(32, 32))
    transform = SceneTransform((0.5,) * 3, (1.0,) * 3, TrainScene(augment, (0.5, 0.5, 0.5)))
    read = Scenes(opened(scenes), transform)
    assert read.keys() == [(0, i) for i in range(12)]
    one, same, other = (read[Draw(0, 3, position, 5)] for position in (7, 7, 8))
    assert torch.equal(one[0], same[0])
    assert torch.equal(one[1], same[1])
    assert not torch.equal(one[0], other[0])
    assert one[2] == 0


def test_to_measure_a_picture_is_resized_and_its_labels_are_not() -> None:
    changed = TestScene(lambda height, width: (height // 2, width // 4))(pair(80, 96))
    assert changed.picture.size == (24, 40)
    assert changed.labels.size == (96, 80)
