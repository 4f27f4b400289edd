"""mIoU and pixel accuracy against plain loops."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from training.segment.metrics import (
    IGNORED,
    counts,
    error_of_difference,
    figures,
    mean_iou,
)


def slow(answer, labels, classes):
    """Return IoU of each class, NaN if it is nowhere, and the share of right pixels, in percent."""
    both, either, right, known = [0] * classes, [0] * classes, 0, 0
    for mine, theirs in zip(answer.flatten().tolist(), labels.flatten().tolist(), strict=True):
        if theirs == IGNORED:
            continue
        known += 1
        right += mine == theirs
        for label in range(classes):
            both[label] += mine == label and theirs == label
            either[label] += mine == label or theirs == label
    iou = [100 * b / e if e else math.nan for b, e in zip(both, either, strict=True)]
    return iou, 100 * right / known


@given(st.integers(0, 2**32 - 1), st.integers(2, 5), st.integers(1, 4))
def test_figures_are_those_of_plain_loops(seed, classes, pictures):
    generator = torch.Generator().manual_seed(seed)
    shape = (pictures, 5, 4)
    answer = torch.randint(0, classes, shape, generator=generator, dtype=torch.uint8)
    labels = torch.randint(0, classes, shape, generator=generator, dtype=torch.uint8)
    labels[torch.rand(shape, generator=generator) < 0.3] = IGNORED
    labels[0, 0, 0] = 0  # some pixel counts
    found = counts(answer, labels, classes)
    assert found.shape == (pictures, classes, 2)
    names = tuple(map(str, range(classes)))
    said = figures(found.sum(dim=0), names)
    iou, right = slow(answer, labels, classes)
    for name, expected in zip(names, iou, strict=True):
        if math.isnan(expected):
            assert said["iou"][name] is None
        else:
            assert said["iou"][name] == pytest.approx(expected, abs=0.006)
    there = [each for each in iou if not math.isnan(each)]
    assert said["miou"] == pytest.approx(sum(there) / len(there), abs=0.006)
    assert said["pixel_accuracy"] == pytest.approx(right, abs=0.006)


def test_a_case_worked_by_hand():
    answer = torch.tensor([[[0, 0, 1, 1]]], dtype=torch.uint8)
    labels = torch.tensor([[[0, 1, 1, IGNORED]]], dtype=torch.uint8)
    assert counts(answer, labels, 3).tolist() == [[[1, 2], [1, 2], [0, 0]]]
    said = figures(counts(answer, labels, 3)[0], ("a", "b", "c"))
    assert said == {
        "miou": 50.0,
        "pixel_accuracy": 66.67,
        "iou": {"a": 50.0, "b": 50.0, "c": None},
    }


def test_the_error_of_a_difference_is_that_of_paired_pictures():
    generator = torch.Generator().manual_seed(0)
    either = torch.randint(50, 100, (200, 3), generator=generator)
    both = (either * torch.rand(200, 3, generator=generator)).long()
    one = torch.stack([both, either], dim=2)
    assert error_of_difference(one, one) == 0
    better = torch.stack([(both + 5).minimum(either), either], dim=2)
    other = torch.stack([both.roll(1, 0), either], dim=2)
    # What is better on every picture is surely better; other pictures are noise.
    assert error_of_difference(better, one) < 0.2 * error_of_difference(other, one)
    assert mean_iou(better.sum(dim=0)) - mean_iou(one.sum(dim=0)) > 5
