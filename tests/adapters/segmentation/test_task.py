"""Folders of segmentation: whole, strict, and the backbone's weights are shared."""

import json
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from adapters import BackboneInfo, TaskModel
from adapters.segmentation import (
    DecoderInfo,
    SegmentationInfo,
    SegmentationModel,
    is_segmentation,
    open_segmentation,
)
from adapters.segmentation.task import tensor_shapes, upsampled, usual_palette
from tests.tocom_models import small_model
from tocom import Backbone, ShapeError, TaskError, Variant, forward_dense

COLOURS = ((255, 0, 0), (0, 255, 0), (0, 0, 255))


def backbone(seed: int = 0) -> Backbone:
    return Backbone(small_model(seed=seed), "small", "vit_tiny_patch16_224", ())


def info(**changes: Any) -> SegmentationInfo:
    said = {
        "name": "streets",
        "method": "frozen",
        "backbone": BackboneInfo.of(backbone()),
        "source": 0,
        "class_names": ("road", "sky", "tree"),
        "palette": COLOURS,
        "decoder": DecoderInfo(kind="mask", layers=1, width=16, heads=2),
        "short_side": 64,
        "window": (64, 64),
        "stride": (64, 32),
    }
    return SegmentationInfo.model_validate(said | changes)


def task(seed: int = 0, **changes: Any) -> SegmentationModel:
    said = info(**changes)
    generator = torch.Generator().manual_seed(seed)
    return SegmentationModel(
        said,
        {
            name: torch.randn(shape, generator=generator)
            for name, shape in tensor_shapes(said).items()
        },
    )


@pytest.mark.parametrize("tuned", [{}, {"method": "adaptformer", "rank": 4, "scale": 0.1}])
def test_what_is_written_is_what_is_read(tuned, tmp_path):
    written = task(**tuned)
    read = open_segmentation(written.save(tmp_path / "task"))
    assert read.info == written.info
    for name, tensor in written.tensors.items():
        assert torch.equal(read.tensors[name], tensor)
    with pytest.raises(TaskError, match="exists already"):
        written.save(tmp_path / "task")


def test_it_runs_on_the_backbones_own_weights():
    under, images = backbone(), torch.randn(2, 3, 64, 64)
    made = task(method="adaptformer", rank=4, scale=0.1)
    segmenter = made.on(under)
    assert segmenter.backbone.model is under.model
    variant = Variant(2, None, segmenter.backbone.adapter)
    scores = segmenter.scores(images, variant)
    features = forward_dense(under.model, images, 2, adapter=segmenter.backbone.adapter)
    torch.testing.assert_close(scores, segmenter.decoder(features))
    classes = segmenter.classes(scores, (50, 70))
    assert classes.shape == (2, 50, 70)
    assert classes.dtype == torch.uint8
    assert classes.max() < 3
    assert not any(parameter.requires_grad for parameter in segmenter.decoder.parameters())


def test_larger_pictures_are_seen_through_windows():
    segmenter, images = task().on(backbone()), torch.randn(1, 3, 64, 96)
    scores = segmenter.scores(images, Variant())
    first = segmenter.scores(images[..., :64], Variant())
    second = segmenter.scores(images[..., 32:], Variant())
    torch.testing.assert_close(scores[..., :2], first[..., :2])
    torch.testing.assert_close(scores[..., 2:4], (first[..., 2:] + second[..., :2]) / 2)


@pytest.mark.parametrize(
    ("size", "brought"),
    [((360, 480), (64, 80)), ((1, 1), (64, 64)), ((64, 64), (64, 64)), ((10, 80), (64, 512))],
)
def test_the_shorter_side_is_brought_to_whole_patches(size, brought):
    assert task().on(backbone()).size(*size) == brought


@pytest.mark.parametrize("size", [(20_000, 1), (1, 20_000), (0, 5), (10, 81)])
def test_a_picture_that_is_a_line_is_refused(size):
    with pytest.raises(ShapeError, match=f"8 times as long .* got {size[0]} x {size[1]}"):
        task().on(backbone()).size(*size)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"palette": COLOURS[:2]}, "the palette has 2 colours for 3 classes"),
        ({"palette": (*COLOURS[:2], (0, 0, 256))}, "less than or equal to 255"),
        ({"class_names": ["x"] * 257, "palette": COLOURS}, "at most 256 items"),
        ({"class_names": []}, "at least 1 item"),
        ({"window": (60, 64)}, "a window has whole patches of 16 x 16 pixels"),
        ({"stride": (64, 128)}, "would leave gaps"),
        ({"method": "adaptformer"}, "adaptformer and the rank None do not go together"),
        ({"rank": 4}, "frozen and the rank 4 do not go together"),
        ({"kind": "other"}, "Input should be 'segmentation'"),
    ],
)
def test_what_does_not_fit_together_is_refused(changes, said):
    with pytest.raises(ValidationError, match=said):
        info(**changes)


def test_256_classes_are_not_too_many():
    names = tuple(map(str, range(256)))
    many = task(class_names=names, palette=usual_palette(256), decoder=DecoderInfo(kind="linear"))
    segmenter = many.on(backbone())
    scores = torch.zeros(1, 256, 2, 2)
    scores[:, 255] = 1
    assert segmenter.classes(scores, (2, 2)).unique().tolist() == [255]


def test_a_head_for_another_width_is_refused():
    other = info(decoder=DecoderInfo(kind="mask", layers=1, width=24, heads=2))
    with pytest.raises(TaskError, match=r"'streets': decoder\.classes must be \[1, 3, 24\], got"):
        SegmentationModel(other, task().tensors)


def test_a_head_that_no_memory_can_hold_is_refused():
    width = 2**31 - 2
    other = info(decoder=DecoderInfo(kind="mask", layers=1, width=width, heads=1))
    with pytest.raises(TaskError, match="'streets' says shapes that no tensor can have: "):
        SegmentationModel(other, task().tensors)


def test_another_backbone_is_refused():
    with pytest.raises(TaskError, match="'streets' was tuned on vit_tiny_patch16_224 with the we"):
        task().on(backbone(seed=1))


def test_a_changed_file_is_refused(tmp_path):
    folder = task().save(tmp_path / "task")
    path = folder / "task.json"
    said = json.loads(path.read_text())
    path.write_text(json.dumps(said | {"palette": [[1, 2, 3]] * 3}))
    with pytest.raises(TaskError, match="does not match its digest"):
        open_segmentation(folder)
    path.write_text(json.dumps(said | {"palette": said["palette"][:2]}))
    with pytest.raises(TaskError, match="the palette has 2 colours for 3 classes"):
        open_segmentation(folder)
    (folder / "task.safetensors").write_bytes(b"")
    path.write_text(json.dumps(said))
    with pytest.raises(TaskError, match="truncated or corrupted"):
        open_segmentation(folder)


def test_tasks_of_two_kinds_are_not_mistaken(tmp_path):
    folder = task().save(tmp_path / "task")
    with pytest.raises(TaskError, match="is a task of the kind 'segmentation', which is opened"):
        TaskModel.load(folder)
    with pytest.raises(TaskError, match="is of the kind None, not 'segmentation'"):
        open_segmentation("bundled:deit_tiny_textures")


def test_colours_of_classes_that_have_none_differ():
    colours = usual_palette(256)
    assert len(set(colours)) > 240
    assert len(set(colours[:30])) == 30


@pytest.mark.parametrize("size", [(5, 7), (300, 200), (1, 1)])
def test_classes_of_pixels_are_those_of_scores_at_that_size(size, monkeypatch):
    monkeypatch.setattr("adapters.segmentation.task.STRIP", 5000)
    scores = torch.randn(2, 3, 4, 6)
    found = task().on(backbone()).classes(scores, size)
    expected = upsampled(scores, size).argmax(dim=1)
    assert found.shape == (2, *size)
    assert (found == expected).float().mean() > 0.999


def test_a_folder_says_whether_it_is_of_segmentation(tmp_path):
    assert is_segmentation(task().save(tmp_path / "task"))
    assert not is_segmentation("bundled:deit_tiny_textures")
    assert not is_segmentation("bundled:nothing")
    assert not is_segmentation(tmp_path)
