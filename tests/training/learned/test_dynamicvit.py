"""How DynamicViT learns: masked attention, the forward that drops nothing, the losses."""

import math

import pytest
import torch
import torch.nn.functional as F

from tests import oracle_case
from tests.tocom.reduction.learning import drawn_weights
from tests.tocom_models import pictures, small_model
from tocom import Ladder, ReductionWeights, Variant
from tocom.reduction import DynamicViT
from tocom.reduction.learned import keep_votes
from tocom.vit import embed
from training.learned.dynamicvit import kept_token_loss, policy_attention, pruned, ratio_loss

LADDER = Ladder("d", DynamicViT(), ((0, 0, 0), (0, 9, 5)), patches=16)


@pytest.mark.parametrize("name", ["atsofficial_1", "atsofficial_2"])
def test_masked_attention_agrees_with_the_golden_cases(name):
    _, tensors = oracle_case.read(f"reduction/{name}")
    attention = policy_attention(tensors["logits"], tensors["policy"].squeeze(2))
    torch.testing.assert_close(attention, tensors["attn"], rtol=0, atol=1e-4)


def test_where_nobody_was_dropped_attention_is_softmax():
    scores = torch.randn(2, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    attention = policy_attention(scores, torch.ones(2, 5))
    torch.testing.assert_close(attention, scores.softmax(dim=-1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["vit_tiny", "deit_tiny_distilled", "global_pool", "qk_norm"])
def test_what_is_masked_counts_as_little_as_what_is_gone(kind):
    model = small_model(kind)
    learned, x = drawn_weights(LADDER, model), embed(model, pictures(model, batch=1))
    torch.manual_seed(0)
    answer = pruned(model, x, Variant(1, ladder=LADDER, learned=learned))
    assert answer.tokens.shape == (1, 16, model.embed_dim)
    first, second = (mask[0].bool() for mask in answer.masks)
    assert 16 > first.sum() > second.sum() > 0
    assert not (second & ~first).any()  # who was dropped stays so
    prefix = model.num_prefix_tokens
    front = torch.ones(prefix, dtype=torch.bool)
    x = model.blocks[0](x)
    x = model.blocks[1](x[:, torch.cat([front, first])])
    x = model.blocks[2](x[:, torch.cat([front, second[first]])])
    x = model.norm(x)
    torch.testing.assert_close(answer.logits, model.forward_head(x), rtol=0, atol=1e-3)
    torch.testing.assert_close(answer.tokens[:, second], x[:, prefix:], rtol=0, atol=1e-3)


def test_the_choice_has_the_gradient_of_the_soft_one():
    model = small_model()
    start = drawn_weights(LADDER, model).tensors
    learned = ReductionWeights(
        DynamicViT(), {name: x.requires_grad_() for name, x in start.items()}
    )
    torch.manual_seed(0)
    answer = pruned(
        model, embed(model, pictures(model)), Variant(1, ladder=LADDER, learned=learned)
    )
    F.cross_entropy(answer.logits, torch.tensor([0, 1, 2])).backward()
    assert all(x.grad.isfinite().all() and x.grad.any() for x in learned.tensors.values())


def test_the_choice_is_drawn_by_the_scores_of_inference():
    model = small_model()
    learned = drawn_weights(LADDER, model)
    torch.manual_seed(0)
    answer = pruned(
        model, embed(model, pictures(model)), Variant(1, ladder=LADDER, learned=learned)
    )
    assert (answer.masks[1] <= answer.masks[0]).all()
    # The first choice is Gumbel-softmax of the scores that the same tokens get at inference.
    x = model.blocks[0](embed(model, pictures(model)))[:, 1:]
    votes = keep_votes(x, learned.of(DynamicViT(), 1)).log_softmax(dim=-1)
    torch.manual_seed(0)
    assert torch.equal(F.gumbel_softmax(votes, hard=True)[..., 0], answer.masks[0])


def test_blocks_that_run_again_drop_the_same_tokens():
    model = small_model()
    start = drawn_weights(LADDER, model).tensors
    gradients = []
    for again in (False, True):
        model.set_grad_checkpointing(again)
        learned = ReductionWeights(
            DynamicViT(), {name: x.clone().requires_grad_() for name, x in start.items()}
        )
        torch.manual_seed(0)
        x = embed(model, pictures(model)).requires_grad_()
        pruned(model, x, Variant(1, ladder=LADDER, learned=learned)).logits.sum().backward()
        gradients.append([x.grad, *(each.grad for each in learned.tensors.values())])
    for kept, computed in zip(*gradients, strict=True):
        torch.testing.assert_close(kept, computed)


def test_losses_are_the_papers():
    generator = torch.Generator().manual_seed(0)
    masks = [torch.randint(0, 2, (3, 8), generator=generator).float() for _ in range(2)]
    student, teacher = torch.randn(2, 3, 8, 4, generator=generator)
    shares = (0.7, 0.49)
    slow = 0.0
    for mask, share in zip(masks, shares, strict=True):
        for row in mask.tolist():
            slow += (sum(row) / 8 - share) ** 2 / 3 / 2
    assert math.isclose(ratio_loss(masks, shares).item(), slow, rel_tol=1e-5)
    kept = masks[1] > 0.5  # as the authors' code has it
    expected = (student[kept] - teacher[kept]).square().mean()
    torch.testing.assert_close(kept_token_loss(student, teacher, masks[1]), expected)
    assert kept_token_loss(student, teacher, torch.zeros(3, 8)) == 0
