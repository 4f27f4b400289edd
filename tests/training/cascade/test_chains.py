import pytest
import torch

from adapters.cascade import CascadePoint
from training.cascade.chains import Runs, at_least, best_points


def some_runs(count: int = 200) -> Runs:
    """Answers that agree the more often the surer they are, and the dearer."""
    generator = torch.Generator().manual_seed(0)
    margins = torch.rand(count, 3, generator=generator)
    chance = torch.sigmoid(8 * margins + torch.tensor([0.0, 1.0, 9.0]))
    agree = torch.rand(count, 3, generator=generator) < chance
    agree[:, 2] = True
    return Runs((4, 2, 0), (0.5, 0.75, 1.0), margins, agree)


@pytest.mark.parametrize("longest", [1, 2, 3])
def test_a_point_is_what_running_its_chain_comes_to(longest: int) -> None:
    runs = some_runs()
    for point in best_points(runs, longest, (0.8, 0.9, 0.95, 0.99)):
        measured = runs.measure(point)
        assert len(point.rates) <= longest
        bound = at_least(torch.tensor(measured.agreement), len(runs.agree)).item()
        assert point.agreement == pytest.approx(1.0 if point.rates == (0,) else bound, abs=1e-5)
        assert measured.share == pytest.approx(point.share, abs=1e-6)


def test_each_agreement_has_its_cheapest_point() -> None:
    runs = some_runs()
    asked = (0.95, 0.97, 0.99)
    *points, last = best_points(runs, 2, asked)
    assert {len(point.rates) for point in points} == {2}
    for agreement, point in zip(asked, points, strict=True):
        assert point.agreement >= agreement
        # Every threshold that there is, of the same chain: none is cheaper than the best tried by
        # more than one picture in a hundred.
        for threshold in runs.margins[:, runs.rates.index(point.rates[0])].tolist():
            other = runs.measure(
                CascadePoint(rates=point.rates, thresholds=(threshold,), agreement=1, share=1)
            )
            agreed = at_least(torch.tensor(other.agreement), len(runs.agree)).item()
            assert agreed < agreement or other.share > point.share - 0.01
    assert (last.agreement, last.share) == (1.0, pytest.approx(1.0))


def test_more_runs_are_never_dearer() -> None:
    runs = some_runs()
    two, three = (best_points(runs, longest, (0.95, 0.98)) for longest in (2, 3))
    for short, long in zip(two, three, strict=True):
        assert long.share <= short.share


def test_the_last_rate_is_the_end_of_every_list() -> None:
    runs = some_runs()
    runs.agree[:, :2] = False
    (only,) = best_points(runs, 3, (0.9, 0.99))
    assert only == CascadePoint(rates=(0,), thresholds=(), agreement=1.0, share=1.0)


def test_few_pictures_promise_less_than_they_show() -> None:
    shown = torch.tensor([0.9, 0.99, 1.0])
    assert at_least(shown, 200).tolist() == pytest.approx([0.8768, 0.9801, 0.995], abs=1e-4)
    assert (at_least(shown, 10_000) > at_least(shown, 200)).all()
