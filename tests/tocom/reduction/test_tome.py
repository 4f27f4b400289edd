"""ToMe with options: against plain loops, in its cost, and what it refuses."""

import pytest
import torch

from tests.tocom.reduction.slow_methods import (
    counted,
    of_all_blocks,
    seen_at_random,
    slow_attention_of,
    slow_means,
)
from tests.tocom_models import pictures, small_model
from tocom import ReductionError, cost, forward
from tocom.reduction import Cut, Heads, Seen, Tokens, ToMe, method_of
from tocom.reduction.tome import METRICS, WEIGHTS


def slow_groups(metric, toll, r, prefix):
    """The same as the docstrings say, for one image: which tokens each output holds."""
    rows = [row / row.norm() for row in metric.double()]
    pairs = [
        max((float(rows[a] @ rows[b]) - toll[a] - toll[b], a, b) for b in range(1, len(rows), 2)
            if b >= prefix)
        for a in range(0, len(rows), 2)
        if a >= prefix
    ]  # fmt: skip
    into = {a: b for _, a, b in sorted(pairs, reverse=True)[:r]}
    order = [
        *range(prefix),
        *(i for i in range(prefix, len(rows)) if i % 2 == 0 and i not in into),
        *(i for i in range(prefix, len(rows)) if i % 2 == 1),
    ]
    return [{i} | {a for a, b in into.items() if b == i} for i in order]


@pytest.mark.parametrize("prefix", [1, 2, 5])
@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(
    ("importance", "size"), [(0.0, 0.0), (0.05, 0.0), (0.0, 0.2), (0.3, 0.1), (1.0, 1.0)]
)
def test_it_is_what_its_docstring_says(importance, size, metric, weight, prefix):
    generator = torch.Generator().manual_seed(prefix)
    seen = seen_at_random(generator, batch=3, heads=2, tokens=21, width=4)
    sizes = torch.randint(1, 9, (3, 21, 1), generator=generator).float()
    x = torch.randn(3, 21, 8, generator=generator)
    cut = Cut(block=0, prefix=prefix, leaving=16, grid=(1, 21 - prefix), trace=True)
    left, fate = ToMe(importance, size, metric, weight).reduce(Tokens(x, sizes), seen, cut)
    for i in range(3):
        attention = slow_attention_of(seen, i)[0]
        toll = importance * attention.log() + size * sizes[i, :, 0].log()
        compared = x[i] if metric == "tokens" else seen.mean_key[i]
        groups = slow_groups(compared, toll.tolist(), 5, prefix)
        found = [{*(fate.into[i] == out).nonzero().flatten().tolist()} for out in range(16)]
        assert found == groups
        weights = attention if weight == "class" else sizes[i, :, 0]
        means, counts = slow_means(x[i], weights, sizes[i, :, 0], [[*group] for group in groups])
        torch.testing.assert_close(left.x[i].double(), means, atol=1e-5, rtol=1e-5)
        assert left.size[i, :, 0].tolist() == counts.tolist()


def test_without_options_no_more_is_looked_at(monkeypatch):
    monkeypatch.setattr(Seen, "class_rows", property(lambda seen: pytest.fail("looked at")))
    x = torch.randn(1, 9, 4, generator=torch.Generator().manual_seed(0))
    seen = seen_at_random(torch.Generator().manual_seed(0), 1, 2, 9, 2)
    ToMe().reduce(Tokens(x, torch.ones(1, 9, 1)), seen, Cut(0, 1, 7, (2, 4)))


def test_attention_that_is_rounded_to_nothing_decides_nothing_wrong():
    seen = seen_at_random(torch.Generator().manual_seed(0), 1, 1, 9, 2)
    seen.bias[..., 3:5] = -torch.inf
    x = torch.randn(1, 9, 2)
    method = ToMe(importance=0.05, weight="class")
    left, fate = method.reduce(Tokens(x), seen, Cut(0, 1, 6, (2, 4), True))
    assert left.x.isfinite().all()
    assert fate.margin.isfinite().all()


@pytest.mark.parametrize("method", [ToMe(0.05, 0.02), ToMe(0.0, 0.0, "tokens", "class")])
def test_its_cost_is_that_of_a_counted_run(method):
    model = small_model("deit_tiny_distilled")
    ladder = of_all_blocks(method, 3, model.patch_embed.num_patches)
    assert cost(model, 1, ladder=ladder).macs == counted(model, ladder)


def test_importance_costs_one_row_of_attention():
    heads = Heads(3, 64)
    more = ToMe(0.05).macs(197, 181, 192, heads) - ToMe(size=0.05).macs(197, 181, 192, heads)
    assert more == 197 * 192


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_decides_is_not_rounded_under_autocast(dtype):
    seen = seen_at_random(torch.Generator().manual_seed(0), 2, 2, 15, 8)
    with torch.autocast("cpu", dtype):
        under = seen.class_attention
    again = seen_at_random(torch.Generator().manual_seed(0), 2, 2, 15, 8)
    assert torch.equal(under, again.class_attention)


def test_an_image_is_reduced_alone_as_in_a_batch():
    model = small_model()
    images = pictures(model, 4)
    ladder = of_all_blocks(ToMe(0.05, 0.05, "tokens", "class"), 3, 16)
    together = forward(model, images, 1, ladder=ladder)
    alone = torch.cat([forward(model, image[None], 1, ladder=ladder) for image in images])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("option", ["importance", "size"])
@pytest.mark.parametrize("value", [-0.1, float("nan"), float("inf"), True, "1", None])
def test_options_that_are_no_such_numbers_are_refused(option, value):
    with pytest.raises(
        ReductionError,
        match=f"the option '{option}' of the method 'tome' must be a number of 0 or more, got",
    ):
        method_of("tome", {option: value})


@pytest.mark.parametrize(
    ("option", "allowed"), [("metric", "keys, tokens"), ("weight", "size, class")]
)
@pytest.mark.parametrize("value", ["values", "", True, None, 1, ["size"]])
def test_words_that_are_no_such_option_are_refused(option, allowed, value):
    with pytest.raises(
        ReductionError,
        match=f"the option '{option}' of the method 'tome' must be one of {allowed}, got",
    ):
        method_of("tome", {option: value})


@pytest.mark.parametrize("method", [ToMe(importance=0.1), ToMe(weight="class")])
def test_a_model_without_a_class_token_has_no_attention_of_it(method):
    model = small_model("no_prefix")
    of_all_blocks(ToMe(size=0.1, metric="tokens"), 1, 16).check(model)
    with pytest.raises(ReductionError, match="the method 'tome' reads the class token"):
        of_all_blocks(method, 1, 16).check(model)
