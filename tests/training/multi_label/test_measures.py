"""Average precision and the comparison of answers with several classes."""

import pytest
import torch
from torch import Tensor

from training.multi_label.measures import average_precision, compare_many, mean_average_precision


def slow(scores: Tensor, truth: Tensor) -> float:
    """By the definition: at each threshold the precision, times what it adds to recall."""
    total, before = 0.0, 0.0
    for threshold in scores.unique().flip(0):
        taken = scores >= threshold
        recall = float(truth[taken].sum() / truth.sum())
        total += (recall - before) * float(truth[taken].mean())
        before = recall
    return total


def test_average_precision_of_a_case_worked_by_hand() -> None:
    scores = torch.tensor([[0.1], [0.4], [0.35], [0.8]])
    truth = torch.tensor([[0], [0], [1], [1]])
    assert average_precision(scores, truth).item() == pytest.approx((1 + 2 / 3) / 2)


@pytest.mark.parametrize("seed", range(3))
def test_average_precision_is_its_definition_with_equals_too(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(0, 8, (40, 3), generator=generator).float()
    truth = torch.randint(0, 2, (40, 3), generator=generator).float()
    expected = [slow(scores[:, c], truth[:, c]) for c in range(3)]
    assert average_precision(scores, truth).tolist() == pytest.approx(expected)


def test_classes_that_no_picture_has_are_left_out_of_the_mean() -> None:
    scores, truth = torch.tensor([[0.9, 0.9], [0.1, 0.1]]), torch.tensor([[0, 0], [1, 0]])
    assert average_precision(scores, truth)[1].isnan()
    assert mean_average_precision(scores, truth) == pytest.approx(0.5)


def test_answers_agree_where_the_same_classes_are_above_the_threshold() -> None:
    reference = torch.tensor([[2.0, -1.0], [2.0, -1.0]])
    answer = torch.tensor([[0.5, -3.0], [2.0, 0.1]])
    top1, agreement, kl = compare_many(answer, reference).unbind(dim=1)
    assert top1.tolist() == [0, 0]
    assert agreement.tolist() == [1, 0]
    two = torch.distributions.Bernoulli
    expected = torch.distributions.kl_divergence(two(logits=reference), two(logits=answer))
    assert kl.tolist() == pytest.approx(expected.sum(dim=1).tolist())
