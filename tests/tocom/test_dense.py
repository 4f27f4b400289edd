"""The grid back from reduced tokens, pictures of any size, windows."""

import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.tocom.reduction.learning import drawn_weights
from tests.tocom.reduction.test_properties import kinds, ladder_of
from tests.tocom_models import KINDS, SMALL, pictures, small_model
from tocom import Ladder, ShapeError, Variant, forward_dense, forward_features
from tocom.dense import embed, restore, slide, starts
from tocom.reduction import ATME, METHODS, AroundMLP, EViT, Fate, Pattern, ToMe, TopK
from tocom.reduction.protocol import Cut, Tokens
from tocom.vit import State, run_blocks
from tocom.vit import embed as embed_own

AROUND = Ladder("around", AroundMLP(), ((0, 0, 0), (3, 0, 7), (8, 8, 8)), patches=16)


def final(model, images, ladder, rate=1):
    """Return the tokens after each block, traced."""
    return list(run_blocks(model, embed_own(model, images), Variant(rate, ladder=ladder), True))


@pytest.mark.parametrize("kind", KINDS)
def test_rung_0_is_the_stock_models_features_bit_for_bit(kind):
    model = small_model(kind)
    images = pictures(model)
    grid = model.patch_embed.grid_size
    expected = model.forward_features(images)[:, model.num_prefix_tokens :]
    for ladder in (AROUND, Ladder("tome", ToMe())):
        found = forward_dense(model, images, 0, ladder=ladder)
        assert torch.equal(found, expected.transpose(1, 2).unflatten(2, grid))


@pytest.mark.parametrize("size", [(64, 96), (32, 48), (80, 64)])
@pytest.mark.parametrize("kind", ["vit_tiny", "deit_tiny_distilled", "deit3_small", "no_prefix"])
def test_other_sizes_are_those_of_timm(kind, size):
    model = small_model(kind)
    images = pictures(model, size=size)
    before = {name: each.clone() for name, each in model.state_dict().items()}
    found = embed(model, images)
    for name, each in model.state_dict().items():
        assert torch.equal(each, before[name])
    assert not model.dynamic_img_size
    architecture, arguments = KINDS[kind]
    dynamic = timm.create_model(architecture, **SMALL | arguments, dynamic_img_size=True).eval()
    dynamic.load_state_dict(model.state_dict())
    assert torch.equal(found, embed_own(dynamic, images))
    features = forward_dense(model, images, 2, ladder=AROUND)
    assert features.shape == (3, model.embed_dim, size[0] // 16, size[1] // 16)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_gives_a_grid(name):
    ladder = ladder_of(name)
    for kind in set(kinds(name)) & {"vit_tiny", "dinov2_registers", "no_prefix"}:
        model = small_model(kind)
        images = pictures(model, batch=2)
        for rate in (1, 3):
            learned = drawn_weights(ladder, model)
            found = forward_dense(model, images, rate, ladder=ladder, learned=learned)
            assert found.shape == (2, model.embed_dim, *model.patch_embed.grid_size)
            assert found.isfinite().all()
            alone = forward_dense(model, images[:1], rate, ladder=ladder, learned=learned)
            torch.testing.assert_close(alone, found[:1], rtol=1e-4, atol=1e-3)


def test_merged_tokens_are_those_of_their_group():
    model = small_model()
    ladder, images = Ladder("tome", ToMe()), pictures(model)
    last = final(model, images, ladder, 3)[-1]
    tokens = forward_features(model, images, 3, ladder=ladder)
    found = forward_dense(model, images, 3, ladder=ladder).flatten(2).transpose(1, 2)
    for i in range(3):
        for place in range(16):
            assert torch.equal(found[i, place], tokens[i, last.source[i, 1 + place]])


@pytest.mark.parametrize("method", [TopK(), EViT(), Pattern()])
def test_a_dropped_token_has_the_value_that_it_had(method):
    """Dropped in the second block of three, whatever happens to the others after that."""
    model = small_model()
    images = pictures(model)
    ladder = Ladder("drops", method, ((0, 0, 0), (0, 9, 4)), patches=16)
    states = final(model, images, ladder)
    grid = restore(states, 17)
    fate = states[1].fate
    dropped = (fate.into if fate.dense is None else fate.dense) < 0
    assert dropped.sum() > 0
    assert torch.equal(grid[dropped], fate.before[dropped])
    left = fate.into if fate.dense is None else fate.dense
    last = states[2].fate.into if states[2].fate.dense is None else states[2].fate.dense
    for i in range(3):
        for place in range(17):
            if (now := left[i, place]) >= 0 and (end := last[i, now]) >= 0:
                assert torch.equal(grid[i, place], states[2].x[i, end])


def test_neighbours_have_the_nearest_token():
    model = small_model()
    ladder = Ladder("atme", ATME(), ((0, 0, 0), (1, 0, 1)), patches=16)
    found = forward_dense(model, pictures(model), 1, ladder=ladder)
    assert torch.equal(found[..., ::2, ::2], found[..., 1::2, 1::2])
    assert not torch.equal(found[..., 0, 0], found[..., 2, 2])
    wide = forward_dense(
        model, pictures(model, size=(32, 128)), 1, ladder=ladder
    )  # as many patches
    assert torch.equal(wide[..., ::2, ::2], wide[..., 1::2, 1::2])


@given(st.integers(0, 2**32 - 1), st.booleans())
def test_soft_tokens_are_shared_out(seed, merged_before):
    """Against a plain product of all maps, of which one is soft."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1, 6, 2, generator=generator)
    hard = torch.randint(0, 4, (1, 6), generator=generator)
    hard[0, :4] = torch.arange(4)  # none is empty
    soft = torch.rand(1, 4, 3, generator=generator)
    y = torch.randn(1, 3, 2, generator=generator)
    share = soft / soft.sum(dim=2, keepdim=True)
    if merged_before:
        middle = torch.randn(1, 4, 2, generator=generator)
        states = [
            State(middle, None, None, None, Fate(hard, before=x)),
            State(y, None, None, None, Fate(hard[:, :4], weight=soft, before=middle)),
        ]
        expected, tokens = (share @ y)[0, hard[0]], 6
    else:
        states = [State(y, None, None, None, Fate(hard[:, :4], weight=soft, before=x[:, :4]))]
        expected, tokens = (share @ y)[0], 4
    torch.testing.assert_close(restore(states, tokens)[0], expected)


@pytest.mark.parametrize("name", ["sit", "patchmerger", "sinkhorn"])
def test_methods_with_soft_tokens_tell_their_shares(name):
    """One reduction: each place has the mean of what is left, by its shares in it."""
    method = METHODS[name]()
    x = torch.randn(2, 13, 8, generator=torch.Generator().manual_seed(0))
    learned = {
        key: torch.randn(each.shape, generator=torch.Generator().manual_seed(1))
        for key, each in method.start(8, 6).items()
    }
    cut = Cut(0, prefix=1, leaving=5, grid=(3, 4), trace=True, learned=learned)
    tokens, fate = method.reduce(Tokens(x), None, cut)
    assert fate.weight.shape == (2, 13, 5)
    assert torch.equal(fate.weight.argmax(dim=2)[:, 1:], fate.into[:, 1:])
    state = State(tokens.x, None, None, None, fate._replace(before=x))
    mean = fate.weight / fate.weight.sum(dim=2, keepdim=True)
    torch.testing.assert_close(restore([state], 13), mean @ tokens.x)
    assert torch.equal(restore([state], 13)[:, 0], x[:, 0])


def test_what_is_dropped_after_a_soft_merge_is_not_shared():
    soft = torch.tensor([[[0.5, 0.5], [0.0, 1.0]]])
    x, y = torch.ones(1, 2, 1), torch.tensor([[[3.0], [7.0]]])
    dropped = Fate(torch.tensor([[0, -1]]), before=y)
    states = [
        State(y, None, None, None, Fate(torch.tensor([[0, 1]]), weight=soft, before=x)),
        State(y[:, :1], None, None, None, dropped),
    ]
    assert restore(states, 2)[0].flatten().tolist() == [3.0, 0.0]


@given(st.data())
def test_windows_cover_all_and_are_averaged(data):
    high, wide = (4 * data.draw(st.integers(1, 6)) for _ in range(2))
    window = tuple(4 * data.draw(st.integers(1, 6)) for _ in range(2))
    stride = tuple(4 * data.draw(st.integers(1, each // 4)) for each in window)
    images = torch.rand(2, 3, high, wide, dtype=torch.float64)
    seen = []

    def run(part):
        seen.append(part.shape[-2:])
        return part[..., ::4, ::4]

    found = slide(images, window, stride, run)
    torch.testing.assert_close(found, images[..., ::4, ::4])
    assert set(seen) == {(min(window[0], high), min(window[1], wide))}


def test_windows_that_overlap_are_averaged():
    seen = iter([1.0, 3.0])
    found = slide(
        torch.zeros(1, 3, 4, 12), (4, 8), (4, 4), lambda _: torch.full((1, 1, 1, 2), next(seen))
    )
    assert found.flatten().tolist() == [1, 2, 3]


def test_windows_start_at_every_stride_and_end_with_the_picture():
    assert starts(10, 4, 3) == [0, 3, 6]
    assert starts(11, 4, 3) == [0, 3, 6, 7]
    assert starts(4, 4, 2) == [0]


def test_windows_of_features():
    model = small_model()
    images = pictures(model, size=(64, 96))
    found = forward_dense(model, images, 2, ladder=AROUND, window=(64, 64), stride=(64, 32))
    left = forward_dense(model, images[..., :64], 2, ladder=AROUND)
    assert found.shape == (3, model.embed_dim, 4, 6)
    assert torch.equal(found[..., :2], left[..., :2])


@pytest.mark.parametrize(
    ("size", "windows", "said"),
    [
        ((65, 64), {}, "whole patches of 16 x 16 pixels, got 65 x 64"),
        ((64, 8), {}, "got 64 x 8"),
        ((64, 64), {"window": (60, 64)}, "a window has whole patches of 16 x 16 pixels, got 60"),
        ((64, 64), {"window": (64, 64), "stride": (8, 64)}, "a stride has whole patches"),
        ((64, 64), {"window": (32, 32), "stride": (32, 48)}, "would leave gaps"),
    ],
)
def test_what_is_not_of_whole_patches_is_refused(size, windows, said):
    model = small_model()
    with pytest.raises(ShapeError, match=said):
        forward_dense(model, pictures(model, size=size), **windows)
