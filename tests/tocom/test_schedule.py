"""Rates, schedules, plans: every form, clipping, errors."""

import itertools
import json

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests import oracle_case
from tocom import Plan, RateError, plan, schedule

MODELS = ["vit_class", "vit_deep", "vit_distilled", "vit_noprop"]


@pytest.mark.parametrize(
    ("rate", "asked"),
    [
        (0, (0, 0, 0, 0)),
        (8, (8, 8, 8, 8)),
        ((8, -1.0), (16, 10, 5, 0)),
        ((8, 0.5), (4, 6, 9, 12)),
        ((8, 0.0), (8, 8, 8, 8)),
        ((8, 1.0), (0, 5, 10, 16)),
        ((8, 1), (0, 5, 10, 16)),  # not the list [8, 1]
        ((8, 0), (8, 8, 8, 8)),
        ([8, 1], (8, 1, 0, 0)),
        ([8, 1, 2, 3], (8, 1, 2, 3)),
        ((8, 1, 2), (8, 1, 2, 0)),
        ([], (0, 0, 0, 0)),
        (range(4), (0, 1, 2, 3)),
    ],
)
def test_every_form_of_a_rate(rate, asked):
    assert schedule(rate, depth=4) == asked


@pytest.mark.parametrize("inflection", [-1.0, 0.3, 1.0])
def test_inflection_of_a_single_block_starts_the_line(inflection):
    assert schedule((10, inflection), depth=1) == (int(10 * (1 - inflection)),)


@given(st.integers(0, 64), st.floats(-1, 1), st.integers(2, 48))
@example(31, -0.95, 8)  # eight times a seventh of the way, in floats, is short of the end
def test_inflection_ends_where_it_should_and_runs_one_way(r, inflection, depth):
    counts = schedule((r, inflection), depth)
    low = int(r * (1 - inflection))
    assert (counts[0], counts[-1]) == (low, 2 * r - low)
    rises = [after - before for before, after in itertools.pairwise(counts)]
    assert all(rise >= 0 for rise in rises) or all(rise <= 0 for rise in rises)
    # On a straight line steps of whole tokens differ by one at most.
    assert max(rises) - min(rises) <= 1


@pytest.mark.parametrize(
    ("rate", "message"),
    [
        (-1, "rate must be 0 or more, got -1"),
        (True, r"a rate is a whole number, \(r, inflection\) or a list, got True"),
        (8.0, r"a rate is a whole number, \(r, inflection\) or a list, got 8\.0"),
        ("8", r"a rate is a whole number, \(r, inflection\) or a list, got '8'"),
        (b"8", r"a rate is a whole number, \(r, inflection\) or a list, got b'8'"),
        (None, r"a rate is a whole number, \(r, inflection\) or a list, got None"),
        ({8}, r"a rate is a whole number, \(r, inflection\) or a list, got \{8\}"),
        ((8, -1.01), r"the inflection must be in \[-1, 1\], got -1\.01"),
        ((8, 2), r"the inflection must be in \[-1, 1\], got 2"),
        ((8, float("nan")), r"the inflection must be in \[-1, 1\], got nan"),
        ((8, "1"), "the inflection must be a number, got '1'"),
        ((8, True), "the inflection must be a number, got True"),
        ((8.0, 0.5), r"rate must be a whole number, got 8\.0"),
        ((True, 0.5), "rate must be a whole number, got True"),
        ((-8, 0.5), "rate must be 0 or more, got -8"),
        ([8, -1], "entry 1 of the rate must be 0 or more, got -1"),
        ([8.0], r"entry 0 of the rate must be a whole number, got 8\.0"),
        ([1, 2, False], "entry 2 of the rate must be a whole number, got False"),
        ([1, [2]], r"entry 1 of the rate must be a whole number, got \[2\]"),
        ([1, 2, 3, 4, 5], r"at most one entry a block \(4\), got 5"),
    ],
)
def test_a_malformed_rate_is_refused_by_name(rate, message):
    with pytest.raises(RateError, match=message):
        schedule(rate, depth=4)
    with pytest.raises(RateError, match=message):
        plan(rate, depth=4, tokens=65, prefix=1)


def test_a_plan_removes_at_most_half_of_what_may_merge():
    clipped = plan(16, depth=12, tokens=197, prefix=1)
    assert clipped.removed == (16,) * 11 + (10,)
    assert clipped.tokens[-1] == 11
    assert clipped.asked == (16,) * 12
    assert clipped.clipped

    exact = plan(15, depth=12, tokens=197, prefix=1)
    assert exact.removed == (15,) * 12
    assert exact.tokens == tuple(197 - 15 * i for i in range(1, 13))
    assert not exact.clipped


def test_what_is_clipped_early_is_not_made_up_for_later():
    assert plan([99, 0, 1], depth=3, tokens=10, prefix=2) == Plan(
        tokens_in=10,
        prefix=2,
        asked=(99, 0, 1),
        removed=(4, 0, 1),
        acts=(True, False, True),
        grid=(1, 8),
    )


@pytest.mark.parametrize("prefix", [0, 1, 2, 5])
def test_the_prefix_and_one_token_always_stay(prefix):
    steps = plan(1000, depth=12, tokens=prefix + 64, prefix=prefix)
    assert steps.tokens[-1] == prefix + 1
    assert steps.clipped


@given(
    st.one_of(st.integers(0, 40), st.lists(st.integers(0, 40), max_size=6)),
    st.integers(0, 6),
    st.integers(0, 60),
)
def test_tokens_are_what_is_left_after_each_block(rate, prefix, patches):
    steps = plan(rate, depth=6, tokens=prefix + patches, prefix=prefix)
    left = prefix + patches
    for asked, removed, tokens in zip(steps.asked, steps.removed, steps.tokens, strict=True):
        assert removed == min(asked, (left - prefix) // 2)
        left -= removed
        assert tokens == left
    assert steps.clipped == (steps.removed != steps.asked)


@pytest.mark.parametrize("name", MODELS)
def test_the_reference_has_the_same_schedules_and_token_counts(name):
    case, tensors = oracle_case.read(name)
    model = oracle_case.build(case, tensors)
    tokens = model.patch_embed.num_patches + model.num_prefix_tokens
    for i, rate in enumerate(oracle_case.rates(case)):
        steps = plan(rate, len(model.blocks), tokens, model.num_prefix_tokens)
        assert steps.asked == tuple(case["schedules"][f"r{i}"]), rate
        assert steps.tokens == tuple(case["tokens"][f"r{i}"]), rate


def test_a_plan_can_be_printed_and_compared():
    # It goes into logs and is a key of caches.
    steps = plan(8, depth=2, tokens=65, prefix=1)
    assert {steps: 1}[plan(8, depth=2, tokens=65, prefix=1)] == 1
    assert json.dumps(steps.tokens) == "[57, 49]"
