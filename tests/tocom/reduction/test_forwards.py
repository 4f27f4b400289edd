"""Forwards with methods that see tokens as points in space or on a grid: what all must hold."""

import pytest
import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.tocom_models import KINDS, pictures, small_model
from tocom import TOME, Delta, Ladder, LowRank, Variant, cost, forward, trace
from tocom.reduction import ATME, ATS, DPCKNN, KMedoids, Pattern
from tocom.vit import embed, outputs

#: For three blocks and 4 x 4 patches: the rung, and the patch tokens that leave each block.
RUNGS = {
    KMedoids(): ((0, 9, 4), (16, 9, 4)),
    KMedoids(iterations=1, update="reference"): ((0, 16, 5), (16, 16, 5)),
    DPCKNN(): ((12, 12, 3), (12, 12, 3)),
    Pattern("l1"): ((11, 0, 9), (12, 12, 12)),
    Pattern("l2"): ((13, 0, 3), (12, 12, 4)),
    Pattern("linf"): ((0, 4, 16), (16, 4, 4)),
    ATME(): ((1, 0, 1), (8, 8, 4)),
    ATME("vertical"): ((0, 1, 1), (16, 8, 4)),
}
LADDERS = [
    pytest.param(Ladder("small", method, ((0, 0, 0), rung), patches=16), left, id=repr(method))
    for method, (rung, left) in RUNGS.items()
]


def counted(model, ladder):
    """Multiply-adds of a run, as PyTorch counts them."""
    device = next(model.parameters()).device
    images = torch.zeros(1, 3, *model.patch_embed.img_size, device=device)
    for block in model.blocks:
        block.attn.fused_attn = False  # as two products, which every version counts
    with FlopCounterMode(display=False) as counter:
        forward(model, images, 1, ladder=ladder)
    return counter.get_total_flops() / 2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("ladder", "left"), LADDERS)
def test_every_kind_of_model(ladder, left, kind):
    model = small_model(kind)
    ladder.check(model)
    images, prefix = pictures(model), model.num_prefix_tokens
    assert torch.equal(forward(model, images, 0, ladder=ladder), model(images))

    traced = trace(model, images, 1, ladder=ladder)
    assert traced.plan.tokens == tuple(prefix + patches for patches in left)
    assert torch.equal(traced.logits, forward(model, images, 1, ladder=ladder))
    assert (traced.logits - model(images)).abs().max() > 1e-3
    # Prefix tokens stay first and alone; each token that is left holds at least one.
    assert torch.equal(traced.source[:, :prefix], torch.arange(prefix).expand(3, prefix))
    for source in traced.source[:, prefix:]:
        assert set(source.tolist()) - {-1} == set(range(prefix, traced.plan.tokens[-1]))
    assert cost(model, 1, ladder=ladder).macs == counted(model, ladder)


@pytest.mark.parametrize(("ladder", "left"), LADDERS)
def test_an_image_gets_the_same_answer_alone(ladder, left):
    model = small_model("dinov2_registers")
    images = pictures(model)
    together = trace(model, images, 1, ladder=ladder)
    for i in range(3):
        alone = trace(model, images[i : i + 1], 1, ladder=ladder)
        assert torch.equal(alone.source[0], together.source[i])
        torch.testing.assert_close(alone.logits[0], together.logits[i], rtol=0, atol=1e-5)


@pytest.mark.parametrize(("ladder", "left"), LADDERS)
def test_what_the_head_reads_is_enough(ladder, left):
    model = small_model()
    images = pictures(model)
    short = outputs(model, embed(model, images), Variant(1, ladder=ladder))
    whole = forward(model, images, 1, ladder=ladder)
    torch.testing.assert_close(short.logits, whole, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("ladder", "left"), LADDERS)
def test_a_counted_run_of_deit(ladder, left):
    with torch.device("meta"):
        model = timm.create_model("deit_tiny_patch16_224", depth=3).eval().requires_grad_(False)
    # The amounts of the small pictures, in proportion.
    assert cost(model, 1, ladder=ladder).macs == counted(model, ladder)


@pytest.mark.parametrize(("ladder", "left"), LADDERS)
def test_gradients_flow_through_what_is_left(ladder, left):
    model = small_model()
    images = pictures(model).requires_grad_()
    forward(model, images, 1, ladder=ladder).sum().backward()
    assert images.grad.isfinite().all()
    assert images.grad.abs().max() > 0


@pytest.mark.parametrize(
    ("ladder", "rate"),
    [
        (TOME, 3),
        (Ladder("input", KMedoids(), ((0, 0, 0), (0, 9, 4)), 16), 1),
        (Ladder("attention", ATS(), ((0, 0, 0), (12, 9, 4)), 16), 1),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_blocks_that_run_again_have_the_same_gradients(ladder, rate):
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=64, depth=3, num_classes=10, drop_path_rate=0.3,
        proj_drop_rate=0.2,
    ).train()  # fmt: skip
    pair = LowRank(0.1 * torch.randn(2, 192), 0.1 * torch.randn(192, 2))
    runs = []
    model.blocks[1].norm1.register_forward_pre_hook(lambda *_: runs.append(1))

    def gradients(again):
        model.set_grad_checkpointing(again)
        model.zero_grad()
        learned = [tensor.clone().requires_grad_() for tensor in pair]
        delta = Delta({"blocks.1.attn.q": LowRank(*learned)}, dropout=0.2)
        torch.manual_seed(7)  # what is dropped is dropped again
        logits = forward(model, pictures(model), rate, delta, ladder=ladder)
        logits.square().sum().backward()
        return [logits, *(tensor.grad for tensor in (*model.parameters(), *learned))]

    for kept, computed in zip(gradients(False), gradients(True), strict=True):
        assert torch.equal(kept, computed)
    assert len(runs) == 3
    with torch.no_grad():
        forward(model, pictures(model), rate, ladder=ladder)
    assert len(runs) == 4  # without gradients nothing is run again
