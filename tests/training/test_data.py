import logging
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pydantic import ValidationError

from tocom import Backbone, ConfigError, DataError, load_backbone
from training.config import AugmentConfig, PicturesConfig
from training.data import (
    Draw,
    Pictures,
    Shares,
    StepSampler,
    derive,
    evaluation_batches,
    mixing,
    posterize,
    train_batches,
    train_transform,
)

STRONG = AugmentConfig(
    auto_augment="rand-m9-mstd0.5-inc1", erasing=0.5, interpolation="random", scale=(0.2, 1.0)
)


@pytest.fixture(scope="module")
def backbone(model_folder: Path) -> Backbone:
    return load_backbone(str(model_folder))


def opened(
    path: Path, backbone: Backbone, augment: AugmentConfig = STRONG, **more: Any
) -> Pictures:
    return Pictures([PicturesConfig(path=str(path))], train_transform(backbone, augment), **more)


def scramble() -> None:
    """Leave every generator somewhere else."""
    random.gauss(0, 1)
    np.random.standard_normal()
    torch.randn(())


# The sampler


@given(
    pictures=st.integers(1, 20), batch=st.integers(1, 8), steps=st.integers(1, 12), data=st.data()
)
def test_sampler_resumes_where_it_stopped(
    pictures: int, batch: int, steps: int, data: st.DataObject
) -> None:
    keys = [(0, i) for i in range(pictures)]
    start = data.draw(st.integers(0, steps))
    whole = list(StepSampler(keys, batch, steps, 0, seed=3))
    assert list(StepSampler(keys, batch, steps, start, seed=3)) == whole[start:]
    flat = [draw for step in whole for draw in step]
    for epoch in range(len(flat) // pictures):  # every picture once an epoch
        drawn = flat[epoch * pictures : (epoch + 1) * pictures]
        assert sorted(draw.index for draw in drawn) == list(range(pictures))


@given(
    pictures=st.integers(1, 20),
    processes=st.integers(1, 3),
    accumulation=st.integers(1, 3),
    size=st.integers(1, 3),
    repeats=st.integers(1, 4),
    start=st.integers(0, 4),
)
def test_processes_and_accumulations_share_out_the_same_batches(
    pictures: int, processes: int, accumulation: int, size: int, repeats: int, start: int
) -> None:
    keys = [(0, i) for i in range(pictures)]
    batch = processes * accumulation * size

    def micros(start: int, shares: Shares) -> list[list[Draw]]:
        sampler = StepSampler(keys, batch, 4, start, 5, repeats, shares)
        drawn = list(sampler)
        assert len(sampler) == len(drawn) == (4 - start) * shares.accumulation
        return drawn

    alone = micros(start, Shares(accumulation=processes * accumulation))
    each = [micros(start, Shares(processes, p, accumulation)) for p in range(processes)]
    assert [each[p][i] for i in range(len(each[0])) for p in range(processes)] == alone
    whole = [draw for step in micros(start, Shares()) for draw in step]
    assert [draw for micro in alone for draw in micro] == whole


def test_repeats_draw_each_picture_in_a_row_under_seeds_of_their_own() -> None:
    keys = [(0, i) for i in range(4)]
    once = [draw.index for step in StepSampler(keys, 4, 3, 0, 5) for draw in step]
    thrice = [draw for step in StepSampler(keys, 12, 3, 0, 5, repeats=3) for draw in step]
    assert [draw.index for draw in thrice] == [index for index in once for _ in range(3)]
    assert len({draw.seed for draw in thrice}) == 36


def test_batches_that_cannot_be_shared_out_are_refused() -> None:
    with pytest.raises(ConfigError, match="10 pictures .* 2 processes x 3 acc.* multiple of 6"):
        StepSampler([(0, 0)], 10, 1, 0, 0, shares=Shares(2, 0, 3))


def test_derived_seeds_differ_by_seed_purpose_and_position() -> None:
    seeds = {derive(s, purpose, p) for s in (0, 1) for purpose in ("a", "b") for p in range(50)}
    assert len(seeds) == 200


# Augmentation


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


def test_erasing_fills_with_noise(pictures: Path, backbone: Backbone) -> None:
    plain = AugmentConfig(color_jitter=0, hflip=0, scale=(1, 1))
    draw = Draw(0, 0, 0)
    image = opened(pictures, backbone, plain)[draw][0]
    erased = opened(pictures, backbone, plain.model_copy(update={"erasing": 1.0}))[draw][0]
    noise = erased[image != erased]
    assert 0.02 < noise.numel() / image.numel() < 0.4
    assert len(noise.unique()) > 0.9 * noise.numel()


@pytest.mark.parametrize(("bits", "kept"), [(8, 255), (9, 255), (3, 224), (1, 128), (0, 0)])
def test_posterize_keeps_the_highest_bits_and_none_is_black(bits: int, kept: int) -> None:
    assert posterize(Image.new("RGB", (1, 1), "white"), bits).getpixel((0, 0)) == (kept,) * 3


@pytest.mark.parametrize("policy", ["rand-m10-n4-p1-inc1", "original", "v0r", "augmix-m10-w2"])
def test_strongest_policies_run(pictures: Path, backbone: Backbone, policy: str) -> None:
    sets = opened(pictures, backbone, AugmentConfig(auto_augment=policy))
    for i in range(60):
        assert torch.isfinite(sets[Draw(0, i % 24, i)][0]).all()


@pytest.mark.parametrize("policy", ["nonsense", "rand-x9"])
def test_unknown_policies_are_named(backbone: Backbone, policy: str) -> None:
    with pytest.raises(ConfigError, match=f"in timm's notation.*got '{policy}'"):
        train_transform(backbone, AugmentConfig(auto_augment=policy))


@pytest.mark.parametrize("scale", [(0.5, 0.2), (0, 1), (0.5, 1.1)])
def test_crops_are_a_range_of_shares(scale: tuple[float, float]) -> None:
    with pytest.raises(ValidationError, match="from a smallest to a largest share"):
        AugmentConfig(scale=scale)


def test_mixing_is_a_function_of_its_seed() -> None:
    mix = mixing(AugmentConfig(mixup=0.8, cutmix=1.0), classes=5, label_smoothing=0.1)
    assert mix is not None
    images, labels = torch.rand(6, 3, 8, 8), torch.arange(6) % 5

    def mixed(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        scramble()
        np.random.seed(seed)
        return mix(images.clone(), labels)

    answers = [mixed(seed) for seed in range(8)]
    for seed, (pictures, targets) in enumerate(answers):
        again = mixed(seed)
        assert torch.equal(pictures, again[0])
        assert torch.equal(targets, again[1])
        torch.testing.assert_close(targets.sum(dim=1), torch.ones(6))
    assert len({pictures[0].sum().item() for pictures, _ in answers}) == 8


def test_without_alphas_there_is_no_mixing() -> None:
    assert mixing(AugmentConfig(), 5, 0.1) is None


# Batches


def test_batches_do_not_depend_on_worker_processes(pictures: Path, backbone: Backbone) -> None:
    sets = opened(pictures, backbone)
    sampler = StepSampler(sets.keys(), 5, 3, 0, seed=1)
    alone = list(train_batches(sets, sampler, workers=0))  # the workers inherit an open .tar
    for workers in (1, 2):
        helped = list(train_batches(sets, sampler, workers))
        for batch, other in zip(alone, helped, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(batch, other, strict=True))
    assert not torch.equal(alone[0][0], alone[1][0])


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
            assert torch.equal(image, whole[Draw(0, replaced, draw.seed)][0])
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


def test_a_set_without_a_readable_picture_ends_the_search(
    damaged: Path, backbone: Backbone
) -> None:
    sets = opened(damaged, backbone, on_unreadable="skip")
    for file in damaged.iterdir():
        file.write_bytes(b"no picture")
    with pytest.raises(DataError, match="none of the 5 pictures of .* can be read"):
        sets[Draw(0, 3, 0)]
