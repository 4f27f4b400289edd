"""The measures of an analysis: golden cases, and what can be worked out by hand."""

from itertools import permutations

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.oracle_case import read
from training.analysis.correlation import kendall, pearson, spearman
from training.analysis.features import canonical, centred, cka, procrustes
from training.analysis.maps import earth_movers, js, kl, similarity, transport
from training.analysis.tokens import agreement, kept, overlap

CASES = ("analysis_1", "analysis_2")


def agrees(found: dict[str, float], case: dict[str, Tensor]) -> None:
    for name, value in found.items():
        assert value == pytest.approx(case[f"out.{name}"].item(), abs=1e-9), name


@pytest.mark.parametrize("name", CASES)
def test_tokens_agree_with_the_golden_cases(name: str) -> None:
    _, case = read(f"reduction/{name}")
    first, second = torch.zeros(2, 1, 196, dtype=torch.bool)
    first[0, case["kept_1"]], second[0, case["kept_2"]] = True, True
    sets = overlap(first, second)
    clusters = agreement(case["cluster_1"][None], case["cluster_2"][None])
    agrees({key: each.item() for key, each in (sets._asdict() | clusters._asdict()).items()}, case)


@pytest.mark.parametrize("name", CASES)
def test_features_agree_with_the_golden_cases(name: str) -> None:
    _, case = read(f"reduction/{name}")
    a, b = centred(case["A"]), centred(case["B"])
    cca = canonical(a, b)
    found = {"procrustes": procrustes(a, b), "cka": cka(a, b), "pwcca": cca.distance}
    agrees(found | {"mean_cca": cca.mean, "mean_sq_cca": cca.mean_squared}, case)


@pytest.mark.parametrize("name", CASES)
def test_maps_and_correlations_agree_with_the_golden_cases(name: str) -> None:
    _, case = read(f"reduction/{name}")
    a, b = case["map_1"], case["map_2"]
    found = {"hm_kl12": kl(a, b), "hm_js": js(a, b), "hm_sim": similarity(a, b)}
    found |= {"hm_pcc": pearson(a.flatten(), b.flatten())}
    found |= {"hm_scc": spearman(a.flatten(), b.flatten())}
    x, y = case["perf"], case["metric"]
    agrees(found | {"spearman": spearman(x, y), "kendall": kendall(x, y)}, case)


def test_a_patch_is_kept_while_its_token_holds_no_other() -> None:
    held = torch.tensor([[1, 2, 2, -1, 3], [-1, -1, 1, 1, 1]])
    assert kept(held).tolist() == [[True, False, False, False, True], [False] * 5]


def test_sets_without_patches_have_no_overlap_and_count_for_nothing() -> None:
    some, none = torch.tensor([[True, False]]), torch.tensor([[False, False]])
    assert overlap(some, none).iou.tolist() == [0]
    assert overlap(some, none).ioa.isnan().all()
    assert overlap(none, none).iou.isnan().all()


def test_clusters_agree_whatever_they_are_called_and_what_was_dropped_is_left_out() -> None:
    first = torch.tensor([[0, 0, 1, 1, -1], [3, 3, 3, 3, 3]])
    second = torch.tensor([[7, 7, 2, 2, 2], [0, 0, 1, 1, -1]])
    found = agreement(first, second)
    assert found.nmi.tolist() == pytest.approx([1, 0])
    assert found.homogeneity.tolist() == pytest.approx([1, 1])  # one cluster has nothing to tell
    assert found.completeness.tolist() == pytest.approx([1, 0])


def test_turned_features_are_alike() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(6, 40, generator=generator)
    turn, _ = torch.linalg.qr(torch.randn(6, 6, generator=generator))
    a, b = centred(features), centred(turn @ features + 3)
    assert procrustes(a, b) == pytest.approx(0, abs=1e-6)
    assert cka(a, b) == pytest.approx(0, abs=1e-6)
    assert canonical(a, b).distance == pytest.approx(0, abs=1e-6)


def test_features_that_do_not_fill_their_channels_are_compared_where_they_do() -> None:
    few = torch.randn(3, 40, generator=torch.Generator().manual_seed(0))
    cca = canonical(centred(torch.cat([few, few])), centred(few))
    assert cca.mean == pytest.approx(1, abs=1e-6)


def test_moving_earth_is_the_best_assignment() -> None:
    draw = np.random.default_rng(0)
    for _ in range(5):
        cost, one = draw.random((5, 5)), np.ones(5)
        best = min(sum(cost[range(5), order]) for order in permutations(range(5)))
        assert transport(one, one, cost) == pytest.approx(best)


def test_moving_earth_along_a_line_is_what_passes_between_neighbours() -> None:
    a, b = torch.rand(2, 1, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    passed = (a / a.sum() - b / b.sum()).cumsum(dim=1).abs().sum()
    assert earth_movers(a, b) == pytest.approx(passed.item())
    assert earth_movers(a, a) == 0


def test_moving_earth_goes_straight() -> None:
    a, b = torch.zeros(2, 4, 5)
    a[0, 0], b[3, 4] = 2, 7
    assert earth_movers(a, b) == pytest.approx(5)


def test_equals_share_their_rank() -> None:
    x, y = torch.tensor([1.0, 1, 2, 3]), torch.tensor([1.0, 2, 3, 3])
    assert spearman(x, y) == pytest.approx(8 / 9)  # ranks 1.5 1.5 3 4 and 1 2 3.5 3.5
    assert kendall(x, y) == pytest.approx(4 / 5)  # four pairs agree, one is equal in each
