"""Compactors: their gradient, what they feel, and folding them into a smaller model."""

import copy

import pytest
import torch
from torch import nn

from tests import oracle_case
from tests.tocom_models import pictures, small_model
from tocom import Variant, cost, forward
from tocom.pruned import Channels
from tocom.reduction import ATME, ATS
from training.ladders.chosen import usual_ladder
from training.prune.compactors import Compacted, choose, compact, compacted, fold, scores_of
from training.prune.selection import Freed, Kept, Scores, select


def masks(model, seed=0):
    """Return masks by which about a third goes."""
    generator = torch.Generator().manual_seed(seed)
    blocks, heads = len(model.blocks), model.blocks[0].attn.num_heads
    width, hidden = model.blocks[0].attn.head_dim, model.blocks[0].mlp.fc1.out_features
    q, k, v = torch.rand(3, blocks, heads, width, generator=generator)
    scores = Scores(q, k, v, torch.rand(blocks, hidden, generator=generator))
    count = blocks * (2 * heads * width + hidden)
    ones = [1] * blocks
    return select(scores, Freed(ones, ones, ones), count / 3).kept


def disturb(model):
    """Move the compactors away from the identity, across heads too."""
    torch.manual_seed(3)
    for layer in compacted(model):
        for compactor in layer.compactors:
            nn.init.normal_(compactor, std=0.02)
            with torch.no_grad():
                compactor.add_(torch.eye(len(compactor)))


@pytest.mark.parametrize("masked", [False, True])
def test_the_golden_update(masked):
    params, case = oracle_case.read("reduction/cdcpupdate_1")
    inputs, width = case["W"].shape
    layer = nn.Linear(inputs, width, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(case["W"].t())
        layer.bias.copy_(case["b"])
    layer = Compacted(layer, 1, masked).double()
    (compactor,) = layer.compactors
    with torch.no_grad():
        compactor.copy_(case["C"])
        layer.kept.copy_(case["mask"])
    (score,) = layer.scores("norm")
    torch.testing.assert_close(score, case["score"], rtol=0, atol=1e-9)
    loss = (layer._compactor(0) * case["dL_dC"]).sum() + params["lam"] * layer.lasso
    loss.backward()
    torch.testing.assert_close(compactor.grad, case["grad"], rtol=0, atol=1e-9)
    torch.optim.SGD([compactor], params["lr"]).step()
    torch.testing.assert_close(compactor.detach(), case["C_after"], rtol=0, atol=1e-9)
    weight, bias = layer.folded()
    keep = case["keep"]
    torch.testing.assert_close(weight.detach().t()[:, keep], case["W_merged"], rtol=0, atol=1e-9)
    torch.testing.assert_close(bias.detach()[keep], case["b_merged"], rtol=0, atol=1e-9)


def test_at_first_they_change_nothing():
    model = small_model()
    expected = forward(model, pictures(model), 3)
    compact(model, masked=False)
    torch.testing.assert_close(forward(model, pictures(model), 3), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["vit_tiny", "deit_tiny_distilled", "deit3_small", "no_prefix"])
def test_the_folded_model_is_the_masked_one(kind):
    model = small_model(kind)
    compact(model, masked=True)
    disturb(model)
    choose(model, masks(model))
    images = pictures(model)
    # Not ToMe, which compares the mean of the keys over the heads: these lose different channels.
    method = ATS() if model.has_class_token else ATME()
    variants = [Variant(0), Variant(1, ladder=usual_ladder(method, model, (0.8,), "other"))]
    expected = [forward(model, images, v.rate, ladder=v.ladder) for v in variants]
    fold(model)
    assert not any(isinstance(module, Compacted) for module in model.modules())
    for variant, logits in zip(variants, expected, strict=True):
        found = forward(model, images, variant.rate, ladder=variant.ladder)
        torch.testing.assert_close(found, logits, rtol=0, atol=1e-5)
    torch.testing.assert_close(model(images), expected[0], rtol=0, atol=1e-5)  # timm's own


def test_without_a_mask_what_goes_counts_until_it_is_cut():
    model = small_model()
    compact(model, masked=False)
    images, kept = pictures(model), masks(model)
    before = forward(model, images)
    choose(model, kept)
    assert torch.equal(forward(model, images), before)
    fold(model)
    assert not torch.equal(forward(model, images), before)


def test_it_loses_the_channels_and_the_multiply_adds():
    model = small_model()
    whole, kept = cost(model).macs, masks(model)
    compact(model, masked=False)
    choose(model, kept)
    fold(model)
    channels = Channels.of(model)
    assert channels is not None
    assert channels.qk == tuple(kept.qk.sum(-1)[:, 0].tolist())
    assert channels.v == tuple(kept.v.sum(-1)[:, 0].tolist())
    assert channels.hidden == tuple(kept.fc1.sum(-1).tolist())
    tokens, width = 17, model.embed_dim
    freed = sum(
        int((~part).sum()) * each
        for part, each in zip(
            kept,
            (2 * tokens * width + tokens**2, 2 * tokens * width + tokens**2, 2 * tokens * width),
            strict=True,
        )
    )
    assert cost(model).macs == whole - freed


def test_they_feel_the_gradient_of_channels_that_are_kept():
    model = small_model()
    compact(model, masked=True)
    before = copy.deepcopy(scores_of(model, "gradient"))
    assert not any(score.any() for score in before)
    kept = masks(model)
    choose(model, Kept(kept.qk, kept.v, torch.ones_like(kept.fc1)))
    for layer in compacted(model):
        layer.compactors.requires_grad_(True)
    forward(model, pictures(model)).square().sum().backward()
    scores = scores_of(model, "gradient")
    assert (scores.v[kept.v] > 0).all()
    assert not scores.v[~kept.v].any()
    gradient = model.blocks[1].mlp.fc1.compactors[0].grad.diagonal()
    torch.testing.assert_close(scores.fc1[1], 0.05 * gradient**2, rtol=1e-4, atol=0)
