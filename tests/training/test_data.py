from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tocom import DataError, load_backbone
from training.config import AugmentConfig, PicturesConfig
from training.data import (
    Pictures,
    StepSampler,
    derive,
    open_pictures,
    train_batches,
    train_transform,
)


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


def test_batches_do_not_depend_on_worker_processes(pictures: Path, model_folder: Path) -> None:
    backbone = load_backbone(str(model_folder))
    sets = Pictures(
        [PicturesConfig(path=str(pictures))], train_transform(backbone, AugmentConfig())
    )
    sampler = StepSampler(sets.keys(), 5, 3, 0, seed=1)
    alone = list(train_batches(sets, sampler, workers=0))
    helped = list(train_batches(sets, sampler, workers=2))
    for (images, labels), (other_images, other_labels) in zip(alone, helped, strict=True):
        assert torch.equal(images, other_images)
        assert torch.equal(labels, other_labels)
    assert not torch.equal(alone[0][0], alone[1][0])


def test_derived_seeds_differ_by_seed_purpose_and_position() -> None:
    seeds = {derive(s, purpose, p) for s in (0, 1) for purpose in ("a", "b") for p in range(50)}
    assert len(seeds) == 200


def test_missing_and_empty_sets_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there are no pictures at .*nowhere"):
        open_pictures(str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match="holds no pictures in class folders"):
        open_pictures(str(tmp_path))
