"""Fixed patterns and merges of neighbours: the golden cases, slow references, properties."""

import itertools
import math

import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests import oracle_case
from tests.tocom_models import SMALL, small_model
from tocom import Ladder, ReductionError
from tocom.reduction import ATME, Cut, Pattern, Tokens
from tocom.reduction.grid import (
    inside,
    merge_neighbours,
    merged_grid,
    merged_ids,
    nearest_count,
    ring_counts,
    shrinking,
)

NORMS = ["l1", "l2", "linf"]
AXES = {"H": "horizontal", "V": "vertical"}
GRIDS = st.tuples(st.integers(1, 9), st.integers(1, 9))


# --- the golden cases


@pytest.mark.parametrize("rate", [90, 70, 50, 25])
@pytest.mark.parametrize("norm", NORMS)
def test_patterns_agree_with_the_golden_case(norm, rate):
    _, tensors = oracle_case.read("reduction/heuristic_14")
    stages = zip(
        tensors[f"{norm}.{rate}.targets"].tolist(),
        tensors[f"{norm}.{rate}.mask_exact"].tolist(),
        tensors[f"{norm}.{rate}.counts"][1].tolist(),
        strict=True,
    )
    left = 196
    for target, mask, count in stages:
        assert nearest_count(norm, (14, 14), target) == count
        assert list(inside(norm, (14, 14), count)) == mask
        left = Pattern(norm).leaving(target, left, (14, 14))
        assert left == count


@pytest.mark.parametrize("norm", NORMS)
def test_whole_numbers_differ_from_the_reference_where_rounding_splits_its_rings(norm):
    _, tensors = oracle_case.read("reduction/heuristic_14")
    differ = {
        rate
        for rate in (90, 70, 50, 25)
        if not torch.equal(tensors[f"{norm}.{rate}.mask_ref"], tensors[f"{norm}.{rate}.mask_exact"])
    }
    assert differ == ({70, 50} if norm == "l1" else set())


@pytest.mark.parametrize("norm", NORMS)
def test_shrinking_patterns_agree_with_the_golden_case(norm):
    case, tensors = oracle_case.read("reduction/heuristic_cont14")
    # The reference's patches are 14 / 13 apart.
    radius = case["min_radius"] * 13 / 14
    amounts = shrinking(norm, (14, 14), 12, case["start"], case["end"], radius)
    assert [*amounts[:3], *amounts[10:]] == [0] * 5
    for amount, mask in zip(amounts[3:10], tensors[f"{norm}.mask"].tolist(), strict=True):
        assert nearest_count(norm, (14, 14), amount) == amount
        assert list(inside(norm, (14, 14), amount)) == mask


@pytest.mark.parametrize("name", ["atme_1", "atme_2"])
def test_merges_of_neighbours_agree_with_the_golden_cases(name):
    case, tensors = oracle_case.read(f"reduction/{name}")
    grid, x = tuple(case["grid"]), tensors["x"]
    source = torch.arange(grid[0] * grid[1])
    for i, letter in enumerate(case["order"], start=1):
        axis, weight, bias = AXES[letter], tensors[f"W_{i}"], tensors[f"b_{i}"]
        merged = merge_neighbours(x[:, 1:].unflatten(1, grid), axis, weight, bias)
        x = torch.cat([x[:, :1], merged.flatten(1, 2)], dim=1)
        torch.testing.assert_close(x.double(), tensors[f"x_out_{i}"], rtol=0, atol=1e-4)
        source = merged_ids(grid, axis, x.device)[source]
        grid = merged_grid(grid, axis)
    restored = x[:, 1:][:, source]
    torch.testing.assert_close(restored.double(), tensors["restored"], rtol=0, atol=1e-4)


# --- slow references


@given(GRIDS, st.sampled_from(NORMS), st.integers(1, 90))
def test_patterns_equal_plain_distances(grid, norm, amount):
    power = {"l1": 1, "l2": 2, "linf": math.inf}[norm]
    far = {}
    for row, column in itertools.product(range(grid[0]), range(grid[1])):
        y, x = abs(row - (grid[0] - 1) / 2), abs(column - (grid[1] - 1) / 2)
        z = max(y, x) if power == math.inf else (y**power + x**power) ** (1 / power)
        far[row, column] = round(z, 9)  # rings are further apart
    counts = {z: sum(other <= z for other in far.values()) for z in far.values()}
    assert ring_counts(norm, grid) == tuple(sorted(counts.values()))
    best = min(sorted(counts), key=lambda z: abs(counts[z] - amount))
    assert nearest_count(norm, grid, amount) == counts[best]
    assert inside(norm, grid, counts[best]) == tuple(z <= best for z in far.values())


@given(GRIDS, st.sampled_from(list(AXES.values())))
def test_merges_of_neighbours_equal_plain_loops(grid, axis):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, *grid, 3, generator=generator)
    weight, bias = torch.eye(3).repeat(1, 2) / 2, torch.zeros(3)
    merged = merge_neighbours(x, axis)
    assert merged.shape[1:3] == merged_grid(grid, axis)
    torch.testing.assert_close(merge_neighbours(x, axis, weight, bias), merged)
    ids = merged_ids(grid, axis, x.device).tolist()
    for i, (row, column) in enumerate(itertools.product(range(grid[0]), range(grid[1]))):
        out = (row // 2, column) if axis == "vertical" else (row, column // 2)
        assert ids[i] == out[0] * merged.shape[2] + out[1]
    for row, column in itertools.product(*map(range, merged.shape[1:3])):
        if axis == "vertical":
            pair = [(2 * row, column), (min(2 * row + 1, grid[0] - 1), column)]
        else:
            pair = [(row, 2 * column), (row, min(2 * column + 1, grid[1] - 1))]
        mean = sum(x[:, down, across] for down, across in pair) / 2
        torch.testing.assert_close(merged[:, row, column], mean)


# --- the methods, stage by stage


@given(
    GRIDS,
    st.integers(0, 5),
    st.sampled_from([*map(Pattern, NORMS), *map(ATME, AXES.values())]),
    st.lists(st.integers(1, 90), min_size=1, max_size=6),
)
def test_stages_follow_each_other(grid, prefix, method, amounts):
    patches = grid[0] * grid[1]
    start = torch.randn(2, prefix + patches, 4, generator=torch.Generator().manual_seed(0))
    tokens = Tokens(start)
    source = torch.arange(prefix + patches).expand(2, -1)
    for block, amount in enumerate(amounts):
        left = method.leaving(amount, patches, grid)
        assert 1 <= left <= patches
        if left == patches:  # the plan then leaves the block alone
            continue
        cut = Cut(block, prefix, prefix + left, grid)
        assert method.reduce(tokens, None, cut)[1] is None
        after, fate = method.reduce(tokens, None, cut._replace(trace=True))
        assert after.x.shape == (2, prefix + left, 4)
        assert torch.equal(after.x[:, :prefix], start[:, :prefix])
        for out in range(prefix, prefix + left):
            members = tokens.x[:, fate.into[0] == out]
            assert 1 <= members.shape[1] <= 2
            torch.testing.assert_close(after.x[:, out], members.mean(dim=1))
        tokens, patches, source = after, left, fate.follow(source)
    assert torch.equal(source[0], source[1])
    assert torch.equal(source[:, :prefix], torch.arange(prefix).expand(2, prefix))
    if isinstance(method, Pattern):  # the tokens of the last pattern, in their order
        kept = torch.tensor(inside(method.norm, grid, patches))
        assert torch.equal(source[0, prefix:] >= 0, kept)
        assert torch.equal(tokens.x[:, prefix:], start[:, prefix:][:, kept])
    else:
        assert source.min() == 0


@pytest.mark.parametrize(
    ("grid", "first", "counts"),
    [
        ((4, 6), "horizontal", [12, 6, 4, 2, 1, 1]),  # 4x3, 2x3, 2x2, 1x2, 1x1
        ((4, 6), "vertical", [12, 6, 3, 2, 1, 1]),  # 2x6, 2x3, 1x3, 1x2, 1x1
        ((14, 14), "horizontal", [98, 49, 28, 16, 8, 4]),
        ((1, 8), "vertical", [4, 2, 1, 1]),
    ],
)
def test_merges_go_by_turns_while_there_are_neighbours(grid, first, counts):
    depth = len(counts)
    rungs = ((0,) * depth, (1,) * depth)
    ladder = Ladder("a", ATME(first), rungs, patches=grid[0] * grid[1])
    plan = ladder.plan(1, depth, grid[0] * grid[1] + 1, 1, grid)
    assert [tokens - 1 for tokens in plan.tokens] == counts


def test_a_shrinking_pattern_never_vanishes():
    assert shrinking("l2", (4, 4), 3, 0, 2, radius=0.0) == (12, 4, 4)


# --- what is refused


@pytest.mark.parametrize("method", [Pattern(), ATME()])
def test_models_whose_grid_is_not_known_are_refused(method):
    ladder = Ladder("g", method, ((0, 0, 0), (1, 1, 1)), patches=16)
    ladder.check(small_model())
    for argument, message in [
        ({"dynamic_img_size": True}, "pictures of any size"),
        ({"patch_drop_rate": 0.5}, "drops some in training"),
    ]:
        model = timm.create_model("vit_tiny_patch16_224", **SMALL, **argument)
        with pytest.raises(ReductionError, match=message):
            ladder.check(model)


def test_options_that_there_are_not_are_refused():
    with pytest.raises(ReductionError, match="one of l1, l2, linf, got 'l3'"):
        Pattern("l3")
    with pytest.raises(ReductionError, match="one of horizontal, vertical, got 'H'"):
        ATME("H")
