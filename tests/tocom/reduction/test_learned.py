"""Learned methods: the golden cases, slow references, what is refused."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests import oracle_case
from tests.tocom.reduction.learning import drawn_weights
from tests.tocom_models import pictures, small_model
from tocom import Ladder, ReductionError, ReductionWeights, forward, trace
from tocom.reduction import (
    ATME,
    DPCKNN,
    Cut,
    DynamicViT,
    Method,
    PatchMerger,
    Sinkhorn,
    SiT,
    Tokens,
    method_of,
)
from tocom.reduction.clusters import cluster_means, token_weights
from tocom.reduction.learned import keep_votes, sit_shares, transport

TOLERANCE = {"rtol": 0, "atol": 1e-4}
LEARNED = [DynamicViT(), SiT(), PatchMerger(), Sinkhorn(), DPCKNN(weighted=True), ATME(linear=True)]


def weights_in(tensors):
    return {name.removeprefix("w."): x for name, x in tensors.items() if name.startswith("w.")}


def reduced(method: Method, x, left, prefix, learned, grid=(1, 1)):
    return method.reduce(Tokens(x), None, Cut(0, prefix, prefix + left, grid, True, learned))


# --- the golden cases


@pytest.mark.parametrize("name", ["dynamicvit_1", "dynamicvit_2"])
def test_dynamicvit_agrees_with_the_golden_cases(name):
    case, tensors = oracle_case.read(f"reduction/{name}")
    x, learned = tensors["x"], weights_in(tensors)
    votes = keep_votes(x[:, 1:], learned, tensors["policy"])
    torch.testing.assert_close(votes.log_softmax(dim=2), tensors["logp"], **TOLERANCE)
    if case["policy_all_ones"]:
        left, fate = reduced(DynamicViT(), x, case["K"], 1, learned)
        torch.testing.assert_close(left.x, tensors["x_out"], **TOLERANCE)
        assert torch.equal(
            fate.into.gather(1, 1 + tensors["keep"]), torch.arange(1, 1 + case["K"]).expand(2, -1)
        )
    order = votes[..., 0].sub(votes[..., 1]).argsort(dim=1, descending=True)
    assert torch.equal(order[:, : case["K"]], tensors["keep"])


@pytest.mark.parametrize("name", ["sit_1", "sit_2"])
def test_sit_agrees_with_the_golden_cases(name):
    case, tensors = oracle_case.read(f"reduction/{name}")
    x, learned = tensors["x"], weights_in(tensors)
    torch.testing.assert_close(sit_shares(x, learned, case["K"]), tensors["assign"], **TOLERANCE)
    left, fate = reduced(SiT(), x, case["K"], 0, learned)
    torch.testing.assert_close(left.x, tensors["x_out"], **TOLERANCE)
    assert torch.equal(fate.into, tensors["assign"].argmax(dim=1))


@pytest.mark.parametrize("name", ["patchmerger_1", "patchmerger_2"])
def test_patch_merger_agrees_with_the_golden_cases(name):
    case, tensors = oracle_case.read(f"reduction/{name}")
    method = PatchMerger(scaled=case["scaled"])
    left, fate = reduced(method, tensors["x"], case["K"], 0, weights_in(tensors))
    torch.testing.assert_close(left.x, tensors["x_out"], **TOLERANCE)
    assert torch.equal(fate.into, tensors["assign"].argmax(dim=1))


@pytest.mark.parametrize("name", ["sinkhorn_1", "sinkhorn_2"])
def test_sinkhorn_agrees_with_the_golden_cases(name):
    case, tensors = oracle_case.read(f"reduction/{name}")
    x, v = tensors["x"], tensors["v"]
    shares = transport(F.normalize(x, dim=-1), v, case["eps"], case["iters"])
    torch.testing.assert_close(shares, tensors["assign"], **TOLERANCE)
    method = Sinkhorn(eps=case["eps"], iterations=case["iters"])
    left, fate = reduced(method, x, case["K"], 0, {"v": v})
    torch.testing.assert_close(left.x, tensors["x_out"], **TOLERANCE)
    assert torch.equal(fate.into, tensors["assign"].argmax(dim=1))


@pytest.mark.parametrize("name", ["dpcknn_2", "dpcknn_3"])
def test_weights_of_clusters_agree_with_the_golden_cases(name):
    case, tensors = oracle_case.read(f"reduction/{name}")
    x, cluster = tensors["x"], tensors["assign"]
    weight = token_weights(x, weights_in(tensors))
    means = cluster_means(x, cluster, case["K"], weight)
    torch.testing.assert_close(means, tensors["x_out"], **TOLERANCE)


@pytest.mark.parametrize("name", ["atme_1", "atme_2"])
def test_linear_merges_of_neighbours_agree_with_the_golden_cases(name):
    case, tensors = oracle_case.read(f"reduction/{name}")
    method, grid, x = ATME(linear=True), tuple(case["grid"]), tensors["x"]
    for i in range(1, len(case["order"]) + 1):
        learned = {"weight": tensors[f"W_{i}"], "bias": tensors[f"b_{i}"]}
        left = method.leaving(1, x.shape[1] - 1, grid)
        x = reduced(method, x, left, 1, learned, grid)[0].x
        torch.testing.assert_close(x.double(), tensors[f"x_out_{i}"], **TOLERANCE)


# --- slow references


def test_scores_are_those_of_a_plain_network():
    torch.manual_seed(0)
    x, mask = torch.randn(2, 7, 8), torch.tensor([[1, 1, 0, 1, 0, 0, 1], [0, 0, 0, 0, 1, 0, 0]])
    start = DynamicViT().start(8, 3)
    inner = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.GELU())
    outer = nn.Sequential(nn.Linear(8, 4), nn.GELU(), nn.Linear(4, 2), nn.GELU(), nn.Linear(2, 2))
    nn.ModuleDict({"in_conv": inner, "out_conv": outer}).load_state_dict(start)
    h = inner(x)
    for i, votes in enumerate(keep_votes(x, start, mask.unsqueeze(-1).float())):
        there = h[i][mask[i] == 1][:, 4:].mean(dim=0)
        for j in range(7):
            torch.testing.assert_close(votes[j], outer(torch.cat([h[i, j, :4], there])))
    torch.testing.assert_close(keep_votes(x, start), keep_votes(x, start, torch.ones(2, 7, 1)))


def test_every_token_is_shared_out_and_centres_get_alike():
    torch.manual_seed(0)
    x = F.normalize(torch.randn(2, 30, 8), dim=-1)
    shares = transport(x, torch.randn(5, 8), eps=0.1, iterations=100)
    torch.testing.assert_close(shares.sum(dim=1), torch.ones(2, 30), **TOLERANCE)
    torch.testing.assert_close(shares.sum(dim=2), torch.full((2, 5), 6.0), rtol=0.2, atol=0)


@pytest.mark.parametrize("method", [SiT(), PatchMerger(), Sinkhorn()], ids=repr)
def test_fewer_tokens_are_the_first_of_more(method):
    torch.manual_seed(0)
    x, learned = torch.randn(2, 20, 8), method.start(8, 6)
    few, many = (reduced(method, x, left, 2, learned)[0].x for left in (4, 6))
    assert torch.equal(few[:, :2], x[:, :2])
    if method != Sinkhorn():  # whose centres compete
        torch.testing.assert_close(few, many[:, :6])
    with pytest.raises(ReductionError, match="6 tokens at most were learned .* to leave 7"):
        reduced(method, x, 7, 2, learned)


def test_weights_that_say_nothing_yet_change_nothing():
    torch.manual_seed(0)
    x = torch.randn(2, 13, 8)
    for method, plain in ((DPCKNN(weighted=True), DPCKNN()), (ATME(linear=True), ATME())):
        left = 5 if method.name == "dpcknn" else 6
        started = reduced(method, x, left, 1, method.start(8, 5), (3, 4))[0].x
        torch.testing.assert_close(started, reduced(plain, x, left, 1, None, (3, 4))[0].x)
        assert plain.start(8, 5) == {}


# --- weights beside the model


@pytest.mark.parametrize("method", LEARNED, ids=repr)
def test_weights_are_for_every_rung_and_the_model_runs_on_all(method):
    rungs = ((1, 0, 0), (1, 0, 1)) if method.name == "atme" else ((9, 0, 5), (0, 7, 4))
    ladder = Ladder("l", method, ((0, 0, 0), *rungs), patches=16)
    model = small_model()
    learned = drawn_weights(ladder, model)
    shapes = ladder.shapes(3, model.embed_dim, (4, 4))
    assert {name: tuple(x.shape) for name, x in learned.tensors.items()} == shapes
    blocks = {name.partition(".")[0] for name in shapes}
    assert blocks == ({"0", "2"} if method.name == "atme" else {"0", "1", "2"})
    ladder.check_learned(model, learned)
    images = pictures(model)
    assert torch.equal(forward(model, images, 0, ladder=ladder), model(images))
    for rung in (1, 2):
        traced = trace(model, images, rung, ladder=ladder, learned=learned)
        assert traced.logits.isfinite().all()
        left = ladder.plan(rung, 3, 17, 1, (4, 4)).tokens[-1]
        assert traced.source.max() < left


@pytest.mark.parametrize("method", LEARNED[1:], ids=repr)
def test_what_is_learned_gets_gradients(method):
    # But for DynamicViT, whose choice has none: it learns by a forward of its own.
    rung = (0, 1, 1) if method.name == "atme" else (0, 9, 4)
    ladder = Ladder("l", method, ((0, 0, 0), rung), patches=16)
    model = small_model()
    start = drawn_weights(ladder, model).tensors
    learned = ReductionWeights(method, {name: x.requires_grad_() for name, x in start.items()})
    forward(model, pictures(model), 1, ladder=ladder, learned=learned).sum().backward()
    for name, x in learned.tensors.items():
        assert x.grad.isfinite().all()
        assert x.grad.any() or name.endswith("bias")  # some of which cancel out


def test_a_learned_method_without_its_weights_is_refused():
    model = small_model()
    ladder = Ladder("l", SiT(), ((0, 0, 0), (0, 9, 4)), patches=16)
    images = pictures(model)
    with pytest.raises(ReductionError, match="'sit' runs with weights that are learned, and the"):
        forward(model, images, 1, ladder=ladder)
    with pytest.raises(ReductionError, match="the model has none: tune one on a ladder"):
        ladder.check_learned(model, None)
    other = Ladder("o", PatchMerger(), ladder.rungs, patches=16)
    learned = drawn_weights(other, model)
    with pytest.raises(ReductionError, match=r"of the method PatchMerger\(.*, and the ladder's"):
        forward(model, images, 1, ladder=ladder, learned=learned)
    own = drawn_weights(ladder, model)
    early = Ladder("e", SiT(), ((0, 0, 0), (9, 9, 4)), patches=16)
    with pytest.raises(ReductionError, match="learned nothing for block 0, only for 1, 2"):
        forward(model, images, 1, ladder=early, learned=own)
    with pytest.raises(ReductionError, match="learned nothing for block 0"):
        early.check_learned(model, own)
    more = Ladder("m", SiT(), ((0, 0, 0), (0, 10, 4)), patches=16)
    with pytest.raises(ReductionError, match=r"'m' needs weight.3.weight of block 1 as \[10, 96\]"):
        more.check_learned(model, own)
    Ladder("f", SiT(), ((0, 0, 0), (0, 8, 0)), patches=16).check_learned(model, own)
    # What learns nothing needs none, and does not mind those of others.
    plain = Ladder("p", ATME(), ((0, 0, 0), (0, 1, 1)), patches=16)
    plain.check_learned(model, own)
    assert torch.equal(
        forward(model, images, 1, ladder=plain, learned=own),
        forward(model, images, 1, ladder=plain),
    )


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("sinkhorn", {"eps": 0}, "'eps' of the method 'sinkhorn' must be above 0"),
        ("sinkhorn", {"eps": math.inf}, "must be a number of 0 or more, got inf"),
        ("sinkhorn", {"iterations": 0}, "must be a whole number of 1 or more, got 0"),
        (
            "patchmerger",
            {"scaled": 1},
            "'scaled' of the method 'patchmerger' must be true or false",
        ),
        ("dpcknn", {"weighted": "yes"}, "must be true or false, got 'yes'"),
        ("atme", {"linear": 0}, "must be true or false, got 0"),
        ("sit", {"keep": 3}, "'sit' has no option 'keep'; it has no options"),
    ],
)
def test_options_that_there_are_not_are_refused(name, options, message):
    with pytest.raises(ReductionError, match=message):
        method_of(name, options)
