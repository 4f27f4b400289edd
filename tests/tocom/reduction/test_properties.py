"""What every method of reduction must hold, on every kind of model that it accepts.

A method is covered by its line in the registry.
"""

import functools

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from tests.tocom.reduction.learning import drawn_weights
from tests.tocom_models import KINDS, small_model
from tocom import Ladder, ReductionError, Variant, cost, forward, trace
from tocom.reduction import METHODS, Unit
from tocom.vit import embed, outputs

#: For three blocks and 4 x 4 patches. Some methods read the block before and leave the first alone.
RUNGS = {
    Unit.REMOVED: ((0, 0, 0), (0, 3, 2), (0, 0, 7), (0, 6, 3)),
    Unit.KEPT: ((0, 0, 0), (0, 9, 5), (0, 0, 4), (0, 4, 1)),
    Unit.ONCE: ((0, 0, 0), (0, 0, 1), (0, 1, 0), (0, 1, 1)),
}

#: Each token that is left is a sum over all that entered.
SUMS = ("sit", "patchmerger", "sinkhorn")

every_method = pytest.mark.parametrize("name", METHODS)
few = settings(max_examples=8)


def ladder_of(name):
    """An example of a ladder of a method, for the small models."""
    method = METHODS[name]()
    return Ladder("example", method, RUNGS[method.unit], patches=16)


@functools.cache
def model_of(kind, fused=True):
    model = small_model(kind)
    for block in model.blocks:
        block.attn.fused_attn = fused
    return model


@functools.cache
def weights_of(name, kind):
    """Those of a method that learns, for the small models of a kind; None: it learns nothing."""
    return drawn_weights(ladder_of(name), model_of(kind))


def kinds(name):
    """The kinds of models that a method accepts."""
    return [kind for kind in KINDS if ladder_of(name).method.refuse(model_of(kind)) is None]


@st.composite
def runs(draw, name):
    """A model that the method accepts, its weights, pictures for it and a rung above 0."""
    kind = draw(st.sampled_from(kinds(name)))
    model = model_of(kind, draw(st.booleans()))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    batch = draw(st.integers(1, 4))
    images = torch.randn(batch, 3, *model.patch_embed.img_size, generator=generator)
    # Of faint pictures tokens are alike, of strong ones a few stand out.
    images *= torch.tensor(draw(st.sampled_from([0.01, 1, 5])))
    return model, weights_of(name, kind), images, draw(st.integers(1, len(RUNGS[Unit.KEPT]) - 1))


@every_method
@given(data=st.data())
@few
def test_an_answer_is_the_same_alone_and_in_any_batch(name, data):
    model, learned, images, rate = data.draw(runs(name))
    ladder = ladder_of(name)
    together = trace(model, images, rate, ladder=ladder, learned=learned)
    assume(together.margin.min() > 1e-5)  # closer than this, rounding may decide otherwise
    order = data.draw(st.permutations(range(len(images))))
    again = trace(model, images[order], rate, ladder=ladder, learned=learned)
    for i in range(len(images)):
        alone = trace(model, images[i : i + 1], rate, ladder=ladder, learned=learned)
        for other, j in ((again, order.index(i)), (alone, 0)):
            assert torch.equal(other.source[j], together.source[i])
            assert torch.equal(other.size[j], together.size[i])
            torch.testing.assert_close(other.logits[j], together.logits[i], rtol=1e-5, atol=1e-4)


@every_method
@given(data=st.data())
@few
def test_every_token_is_accounted_for(name, data):
    model, learned, images, rate = data.draw(runs(name))
    ladder, prefix = ladder_of(name), model.num_prefix_tokens
    traced = trace(model, images, rate, ladder=ladder, learned=learned)
    tokens, left = traced.plan.tokens_in, traced.plan.tokens[-1]
    assert traced.source.shape == (len(images), tokens)
    assert traced.size.shape == (len(images), left, 1)
    # Prefix tokens stay first and alone.
    assert torch.equal(traced.source[:, :prefix], torch.arange(prefix).expand(len(images), -1))
    patches = traced.source[:, prefix:]
    assert ((patches == -1) | (patches >= prefix)).all()
    assert (traced.size[:, :prefix] == 1).all()
    for source, size in zip(traced.source, traced.size.flatten(1), strict=True):
        live = size.nonzero().flatten().tolist()
        held = set(source.tolist()) - {-1}
        # None in padding; none of nothing, unless it is a sum that no token has most of.
        assert held <= set(live) if name in SUMS else held == set(live)
        if not ladder.method.by_picture:
            assert live == list(range(left))
        if ladder.method.sizes:
            assert size.sum() == (source >= 0).sum()
            assert torch.equal(source[source >= 0].bincount(minlength=left), size.long())
        else:
            assert set(size.tolist()) <= {0.0, 1.0}


@every_method
@given(data=st.data())
@few
def test_tracing_and_reading_only_the_head_change_nothing(name, data):
    model, learned, images, rate = data.draw(runs(name))
    ladder = ladder_of(name)
    logits = forward(model, images, rate, ladder=ladder, learned=learned)
    traced = trace(model, images, rate, ladder=ladder, learned=learned)
    assert torch.equal(traced.logits, logits)
    assume(traced.margin.min() > 1e-5)
    short = outputs(model, embed(model, images), Variant(rate, ladder=ladder, learned=learned))
    torch.testing.assert_close(short.logits, logits, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(short.features, traced.features, rtol=1e-5, atol=1e-4)


@every_method
def test_rung_0_is_the_stock_model_bit_for_bit(name):
    for kind in kinds(name):
        for fused in (True, False):
            model = model_of(kind, fused)
            images = torch.randn(2, 3, *model.patch_embed.img_size)
            assert torch.equal(forward(model, images, 0, ladder=ladder_of(name)), model(images))


@every_method
def test_the_cost_in_closed_form_is_that_of_a_counted_run(name):
    ladder = ladder_of(name)
    for kind in kinds(name):
        model = model_of(kind, fused=False)  # as two products, which every version counts
        images = torch.zeros(1, 3, *model.patch_embed.img_size)
        for rate in (1, 3):
            with FlopCounterMode(display=False) as counter:
                learned = weights_of(name, kind)
                forward(model, images, rate, ladder=ladder, learned=learned)
            counted = counter.get_total_flops() / 2
            macs = cost(model, rate, ladder=ladder).macs
            assert counted <= macs if ladder.method.by_picture else counted == macs


@every_method
def test_the_example_goes_down(name):
    ladder = ladder_of(name)
    for kind in kinds(name):
        spent = [cost(model_of(kind), rate, ladder=ladder).macs for rate in (0, 1, 3)]
        assert spent == sorted(set(spent), reverse=True)


@pytest.mark.parametrize("name", [name for name in METHODS if METHODS[name]().needs_class])
def test_a_model_without_a_class_token_is_refused_by_who_needs_one(name):
    ladder = ladder_of(name)
    with pytest.raises(ReductionError, match=f"'{name}' reads the class token"):
        ladder.check(model_of("no_prefix"))
    ladder.check(model_of("vit_tiny"))
