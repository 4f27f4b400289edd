"""Models with fewer channels: loaded, run, costed, changed by deltas and built as graphs."""

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from timm.layers import Attention
from timm.models import save_for_hf

from tests.tocom.reduction.learning import drawn_weights
from tests.tocom_models import pictures, small_model
from tocom import (
    BackboneError,
    Delta,
    Ladder,
    LowRank,
    Variant,
    check_delta,
    cost,
    fold,
    forward,
    load_backbone,
)
from tocom.delta import parts, target_layers
from tocom.engines.openvino import Graph, unsupported
from tocom.pruned import Channels, narrow, refusal
from tocom.reduction import METHODS, Heads, ToMe, method_of
from tocom.vit import embed, outputs

#: Of the three blocks of the small models: 3 heads, or 6 of the small ViT.
CHANNELS = Channels(qk=(5, 64, 1), v=(9, 3, 64), hidden=(20, 1, 30))


def pruned_model(kind="vit_tiny"):
    """Return a small model with random weights in its narrower layers."""
    model = narrow(small_model(kind), CHANNELS)
    torch.manual_seed(1)
    for parameter in model.blocks.parameters():
        torch.nn.init.normal_(parameter, mean=parameter.mean().item(), std=0.05)
    return model.requires_grad_(False)


def saved(folder: Path, model, **changes):
    said = {"pruned": CHANNELS.said | changes.pop("pruned", {})} | changes
    save_for_hf(model, folder, model_config=said, safe_serialization=True)
    return folder


@pytest.mark.parametrize("kind", ["vit_tiny", "deit_tiny_distilled", "deit3_small"])
def test_the_forward_is_timms(kind):
    model = pruned_model(kind)
    images = pictures(model)
    torch.testing.assert_close(forward(model, images), model(images), rtol=0, atol=1e-5)


def test_the_scale_is_that_of_the_model_before():
    model = pruned_model()
    attention, x = model.blocks[0].attn, torch.randn(2, 5, model.embed_dim)
    qkv = attention.qkv(x)
    q, k, v = (t.unflatten(-1, (3, -1)).transpose(1, 2) for t in qkv.split((15, 15, 27), dim=-1))
    expected = (q @ k.transpose(-2, -1) * 64**-0.5).softmax(dim=-1) @ v
    expected = attention.proj(expected.transpose(1, 2).flatten(2))
    torch.testing.assert_close(attention(x), expected, rtol=0, atol=1e-5)


def test_a_folder_loads_as_it_was_saved(tmp_path):
    model = pruned_model()
    backbone = load_backbone(str(saved(tmp_path / "model", model)))
    assert Channels.of(backbone.model) == CHANNELS
    images = pictures(model)
    assert torch.equal(forward(backbone.model, images, 3), forward(model, images, 3))
    assert Channels.of(small_model()) is None


@pytest.mark.parametrize(
    ("pruned", "message"),
    [
        ({"qk": [5, 65, 1]}, r"pruned\.qk must be 3 whole numbers from 1 to 64, got \[5, 65, 1\]"),
        ({"v": [9, 0, 64]}, r"pruned\.v must be 3 whole numbers"),
        ({"hidden": [20, 1]}, r"pruned\.hidden must be 3 whole numbers from 1 to 768"),
        ({"hidden": "all"}, r"pruned\.hidden must be"),
        ({"proj": [1]}, "pruned must say qk, v, hidden, got"),
    ],
)
def test_channels_that_cannot_be_are_refused(tmp_path, pruned, message):
    folder = saved(tmp_path / "model", pruned_model(), pruned=pruned)
    with pytest.raises(BackboneError, match=message):
        load_backbone(str(folder))


def test_weights_of_other_channels_are_refused(tmp_path):
    folder = saved(tmp_path / "model", pruned_model())
    weights = load_file(folder / "model.safetensors")
    weights["blocks.1.mlp.fc1.weight"] = torch.zeros(2, 192)
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(BackboneError, match=r"size mismatch for blocks\.1\.mlp\.fc1\.weight"):
        load_backbone(str(folder))


def test_timm_says_that_the_weights_do_not_fit_without_the_entry(tmp_path):
    folder = saved(tmp_path / "model", pruned_model())
    said = json.loads((folder / "config.json").read_text())
    del said["pruned"]
    (folder / "config.json").write_text(json.dumps(said))
    with pytest.raises(BackboneError, match="cannot be loaded"):
        load_backbone(str(folder))


@pytest.mark.parametrize("name", METHODS)
def test_every_method_runs_and_is_costed(name):
    model = pruned_model()
    method = method_of(name)
    depth, patches = len(model.blocks), model.patch_embed.num_patches
    ladder = Ladder(name, method, ((0,) * depth, method.amounts(0.4, depth, patches)), patches)
    learned = drawn_weights(ladder, model)
    answer = forward(model, pictures(model), 1, ladder=ladder, learned=learned)
    assert answer.isfinite().all()
    assert 0 < cost(model, 1, ladder=ladder).macs < cost(small_model(), 1, ladder=ladder).macs


def test_the_cost_counts_what_is_there():
    model, tokens, width = pruned_model(), (17, 14, 11, 8), 192
    total = cost(model, 3).macs
    expected = 16 * 3 * 16 * 16 * width + width * 10
    for i, (entering, leaving) in enumerate(pairwise(tokens)):
        qk, v, hidden = CHANNELS.qk[i], CHANNELS.v[i], CHANNELS.hidden[i]
        expected += entering * width * 3 * (2 * qk + 2 * v) + entering**2 * 3 * (qk + v)
        expected += 2 * leaving * width * hidden
        expected += ToMe().macs(entering, leaving, width, Heads(3, qk))
    assert total == expected


def test_deltas_have_its_shapes():
    model = pruned_model()
    generator = torch.Generator().manual_seed(0)
    pairs, layers = {}, target_layers(model)
    for name, layer in layers.items():
        for part, rows in parts(name, layer):
            outputs_ = len(range(*rows.indices(layer.out_features)))
            down, up = (
                torch.randn(2, layer.in_features, generator=generator),
                torch.ones(outputs_, 2),
            )
            pairs[part] = LowRank(0.05 * down, 0.05 * up)
    delta, images = Delta(pairs), pictures(model)
    check_delta(model, delta)
    low, whole = forward(model, images, 3, delta), forward(model, images, 3, fold(model, delta))
    torch.testing.assert_close(low, whole, rtol=0, atol=1e-4)
    assert not torch.allclose(whole, forward(model, images, 3), atol=1e-3)


@pytest.mark.parametrize("rate", [0, 3])
def test_its_graphs_answer_as_the_forward_does(rate):
    model = pruned_model()
    assert unsupported(model) is None
    images, variant = pictures(model), Variant(rate)
    with torch.inference_mode():
        expected = outputs(model, embed(model, images), variant)
    found = Graph(model, variant, len(images))(images, variant)
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-4, atol=1e-4)


def test_what_cannot_be_pruned_says_why():
    assert refusal(small_model()) is None
    assert refusal(small_model("qk_norm")) == (
        "a norm sees all channels of its queries, keys, values or MLPs"
    )


def test_timms_attention_has_what_ours_takes_over():
    ours = vars(pruned_model().blocks[0].attn)
    theirs = vars(Attention(12, 3))
    assert theirs.keys() - {"_modules"} <= ours.keys() | {"training"}
    assert theirs["_modules"].keys() - {"gate"} <= ours["_modules"].keys()
