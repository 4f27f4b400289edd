import logging
import multiprocessing
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.training.pictures.opened import opened, scramble
from tocom import Backbone, DataError
from training.config import ElasticConfig
from training.pictures.batches import evaluation_batches, train_batches, unlabelled
from training.pictures.config import PicturesConfig
from training.pictures.sampler import Draw, StepSampler


def test_augmentation_is_a_function_of_the_draw_alone(pictures: Path, backbone: Backbone) -> None:
    sets = opened(pictures, backbone)
    draws = [Draw(0, i % 24, i) for i in range(150)]
    first = [sets[draw][0] for draw in draws]
    for draw, image in reversed(list(zip(draws, first, strict=True))):
        scramble()
        assert torch.equal(sets[draw][0], image)
    assert not torch.equal(sets[Draw(0, 0, 1)][0], sets[Draw(0, 0, 2)][0])


def test_reading_leaves_the_generators_of_accelerators_alone(
    pictures: Path, backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "manual_seed", None)
    assert opened(pictures, backbone)[Draw(0, 0, 0)][0].shape == (3, 32, 32)


def test_batches_do_not_depend_on_worker_processes(pictures: Path, backbone: Backbone) -> None:
    sets = opened(pictures, backbone)
    sampler = StepSampler(sets.keys(), 5, 3, 0, seed=1)
    alone = list(train_batches(sets, sampler, workers=0))  # the workers inherit an open .tar
    for workers in (1, 2):
        helped = list(train_batches(sets, sampler, workers))
        for batch, other in zip(alone, helped, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(batch, other, strict=True))
    assert not torch.equal(alone[0][0], alone[1][0])
    assert all(images.dtype == torch.uint8 for images, *_ in alone)  # travels in a quarter


def test_workers_outlive_a_signal_to_all_processes(pictures: Path, backbone: Backbone) -> None:
    """As `timeout` and schedulers send it: the run still ends its step, and saves."""
    sets = opened(pictures, backbone)
    batches = iter(train_batches(sets, StepSampler(sets.keys(), 5, 8, 0, seed=1), workers=1))
    next(batches)
    (worker,) = multiprocessing.active_children()
    assert worker.pid is not None
    os.kill(worker.pid, signal.SIGTERM)
    assert len(list(batches)) == 7
    del batches
    worker.join()
    assert worker.exitcode == 0


def test_evaluation_reads_every_picture_in_order(pictures: Path, backbone: Backbone) -> None:
    parts = [PicturesConfig(path=str(pictures))]
    for workers in (0, 2):
        batches = evaluation_batches(backbone, parts, batch_size=10, workers=workers)
        assert len(batches) == 3
        labels = torch.cat([labels for _, labels in batches])
        assert labels.tolist() == [0] * 8 + [1] * 8 + [2] * 8
    ((_, labels),) = evaluation_batches(backbone, parts, [(0, 23), (0, 0)])
    assert labels.tolist() == [2, 0]
    assert list(evaluation_batches(backbone, parts, [])) == []
    each = [evaluation_batches(backbone, parts, process=i, processes=3) for i in range(3)]
    assert [[labels.tolist() for _, labels in batches] for batches in each] == [
        [[0] * 3 + [1] * 3 + [2] * 2], [[0] * 3 + [1] * 2 + [2] * 3], [[0] * 2 + [1] * 3 + [2] * 3]
    ]  # fmt: skip


@pytest.mark.parametrize("gpu", [True, False])
def test_batches_are_made_ready_for_a_gpu(
    pictures: Path, backbone: Backbone, monkeypatch: pytest.MonkeyPatch, gpu: bool
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpu)
    sets = opened(pictures, backbone)
    training = train_batches(sets, StepSampler(sets.keys(), 5, 3, 0, seed=1), workers=0)
    measuring = evaluation_batches(backbone, [PicturesConfig(path=str(pictures))])
    assert training.pin_memory == measuring.pin_memory == gpu


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    """Five pictures, grey levels 0, 50, ... 200; number 2 and the last one are broken."""
    for i in range(5):
        Image.new("RGB", (32, 32), (50 * i,) * 3).save(tmp_path / f"{i}.png")
    for i in (2, 4):
        (tmp_path / f"{i}.png").write_bytes(b"no picture")
    return tmp_path


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_pictures_stop_a_run_by_name(
    damaged: Path, backbone: Backbone, workers: int
) -> None:
    sets = opened(damaged, backbone)
    sampler = StepSampler(sets.keys(), 5, 1, 0, seed=1)
    with pytest.raises(DataError, match=rf"^[24]\.png of {damaged} cannot be read: .*\S$") as stop:
        list(train_batches(sets, sampler, workers))
    assert "Traceback" not in str(stop.value)
    with pytest.raises(DataError, match=r"^2\.png of "):
        list(evaluation_batches(backbone, [PicturesConfig(path=str(damaged))], workers=workers))


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_pictures_are_passed_over_and_counted(
    damaged: Path, backbone: Backbone, workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    sets = opened(damaged, backbone, on_unreadable="skip")
    sampler = StepSampler(sets.keys(), 5, 2, 0, seed=1)
    with caplog.at_level(logging.WARNING):
        batches = list(train_batches(sets, sampler, workers))
    whole = opened(damaged, backbone)
    for draws, (images, _, skipped) in zip(sampler, batches, strict=True):
        assert [draw.index for draw in draws if draw.index in (2, 4)] != []
        for draw, image, count in zip(draws, images, skipped, strict=True):
            # The next readable one, wrapping, under the same augmentation.
            replaced = {2: 3, 4: 0}.get(draw.index, draw.index)
            assert count == (replaced != draw.index)
            assert torch.equal(image, whole[replace(draw, index=replaced)][0])
    if workers == 0:  # others' logs are their own
        assert [caplog.text.count(f"{i}.png of") for i in range(5)] == [0, 0, 2, 0, 2]


def test_held_out_pictures_do_not_stand_in_for_unreadable_ones(
    damaged: Path, backbone: Backbone
) -> None:
    sets = opened(damaged, backbone, on_unreadable="skip")
    whole = opened(damaged, backbone)
    sets.held_out = frozenset({(0, 3)})
    assert sets.keys() == [(0, 0), (0, 1), (0, 2), (0, 4)]
    # 2 cannot be read, 3 is held out, 4 cannot be read: 0.
    image, _, skipped = sets[Draw(0, 2, 7)]
    assert skipped == 2
    assert torch.equal(image, whole[Draw(0, 0, 7)][0])


def test_held_out_pictures_are_spread_evenly(damaged: Path, backbone: Backbone) -> None:
    sets = opened(damaged, backbone)
    assert sets.hold_out(2) == [(0, 0), (0, 2)]
    assert sets.keys() == [(0, 1), (0, 3), (0, 4)]
    assert sets.hold_out(0) == []
    with pytest.raises(DataError, match="unseen=3 .* held out of 3: give at most 2"):
        sets.hold_out(3)


def test_a_set_without_a_readable_picture_ends_the_search(
    damaged: Path, backbone: Backbone
) -> None:
    sets = opened(damaged, backbone, on_unreadable="skip")
    for file in damaged.iterdir():
        file.write_bytes(b"no picture")
    with pytest.raises(DataError, match="none of the 5 pictures of .* can be read"):
        sets[Draw(0, 3, 0)]


def test_what_is_watched_has_no_stand_ins(damaged: Path, backbone: Backbone) -> None:
    said = {
        "backbone": {"name": backbone.name},
        "pictures": str(damaged),
        "unseen": 4,
        "loop": {"steps": 1, "batch_size": 1, "learning_rate": 1, "on_unreadable": "skip"},
    }
    config = ElasticConfig.model_validate(said)
    data = unlabelled(backbone, config)
    ((expected, _),) = evaluation_batches(backbone, config.pictures, [(0, 0), (0, 1), (0, 3)])
    assert [torch.equal(images, expected) for images in data.unseen] == [True]
    assert data.keys == [(0, 4)]  # what is held out stays so


def test_several_sets_are_read_without_their_labels(damaged: Path, backbone: Backbone) -> None:
    for name, lines in (("one.txt", "0.png 1"), ("many.txt", "1.png 0,2")):
        (damaged / name).write_text(f"{lines}\n")
    parts = [
        PicturesConfig(path=str(damaged), list="one.txt"),
        PicturesConfig(path=str(damaged), list="many.txt", labels="many"),
    ]
    ((images, labels),) = evaluation_batches(backbone, parts)
    assert len(images) == 2
    assert labels.tolist() == [-1, -1]
