"""OpenVINO's graphs against the golden cases and against the eager forward."""

import weakref

import openvino
import pytest
import timm
import torch

from adapters import compose, open_bank
from tests import oracle_case
from tests.tocom.reduction.learning import drawn_weights
from tests.tocom_models import KINDS, pictures, small_model
from tocom import Adapter, FoldedWeights, Ladder, LowRank, Variant, fold, load_backbone
from tocom.delta import target_layers
from tocom.engines.openvino import Graph, unsupported
from tocom.reduction import DTEM, Method, ToMe
from tocom.vit import embed, outputs

BOTTLENECK = 5
#: Whose class token methods may read.
WITH_CLASS = [kind for kind in KINDS if kind != "no_prefix"]


def adapter(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    width = model.embed_dim

    def drawn(*shape):
        return 0.1 * torch.randn(shape, generator=generator)

    return Adapter(
        [LowRank(drawn(BOTTLENECK, width), drawn(width, BOTTLENECK)) for _ in model.blocks]
    )


def delta(model, seed=0):
    """Return changes of every weight that can be changed."""
    generator = torch.Generator().manual_seed(seed)
    return FoldedWeights(
        {
            name: layer.weight + 0.02 * torch.randn(layer.weight.shape, generator=generator)
            for name, layer in target_layers(model).items()
        }
    )


def agree(graph, model, images, variant):
    with torch.inference_mode():
        expected = outputs(model, embed(model, images), variant)
        found = graph(images, variant)
    torch.testing.assert_close(found.logits, expected.logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found.features, expected.features, atol=1e-4, rtol=1e-4)
    return found.logits


@pytest.mark.parametrize("name", ["vit_class", "vit_deep", "vit_distilled"])
def test_every_rate_agrees_with_the_reference(name):
    case, tensors = oracle_case.read(name)
    model, images = oracle_case.build(case, tensors), tensors["images"]
    for i, rate in enumerate(oracle_case.rates(case)):
        variant = Variant(rate)
        logits = Graph(model, variant, len(images))(images, variant).logits
        torch.testing.assert_close(logits, tensors[f"r{i}.logits"], rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "variant"),
    [
        *((kind, Variant(rate)) for kind in KINDS for rate in (0, 3)),
        ("vit_tiny", Variant(3, proportional=False)),
        ("vit_tiny", Variant(99)),
        ("no_prefix", Variant(99)),
    ],
)
def test_every_kind_of_model_agrees_with_the_eager_forward(kind, variant):
    model = small_model(kind)
    assert unsupported(model) is None
    agree(Graph(model, variant, images=3), model, pictures(model), variant)


@pytest.mark.parametrize(
    ("kind", "method"),
    [
        *((kind, ToMe(0.1, 0.2, "tokens", "class")) for kind in WITH_CLASS),
        ("no_prefix", ToMe(size=0.2, metric="tokens")),
        ("vit_tiny", ToMe(importance=0.05)),
        ("vit_tiny", ToMe(size=0.1)),
        ("vit_tiny", ToMe(weight="class")),
    ],
)
def test_options_agree_with_the_eager_forward(kind, method):
    model, variant = small_model(kind), Variant(3, ladder=Ladder("options", method))
    agree(Graph(model, variant, images=3), model, pictures(model), variant)


@pytest.mark.parametrize(
    ("kind", "rate", "options"),
    [
        *((kind, 3, {"importance": 0.1, "size": 0.2, "weight": "class"}) for kind in WITH_CLASS),
        ("no_prefix", 3, {}),
        ("vit_tiny", 3, {}),
        ("vit_tiny", 0, {}),
    ],
)
def test_one_graph_serves_every_learned_metric(kind, rate, options):
    model, ladder = small_model(kind), Ladder("learned", DTEM(**options, channels=6))
    assert unsupported(model, ladder.method) is None
    images = pictures(model)
    first, second = (
        Variant(rate, ladder=ladder, learned=drawn_weights(ladder, model, seed)) for seed in (1, 2)
    )
    graph = Graph(model, first, images=3)
    found = [agree(graph, model, images, variant) for variant in (first, second, first)]
    assert torch.equal(found[0], found[2])
    assert torch.equal(found[0], found[1]) == (rate == 0)


def test_graphs_of_other_methods_are_refused_by_name():
    class Other(Method):
        name = "other"

        def macs(self, tokens, leaving, width, heads):
            return 0

    assert unsupported(small_model(), ToMe()) is None
    assert unsupported(small_model(), Other()) == "there are no graphs of the method 'other'"


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("rate", [0, 3])
def test_the_scale_of_attention_is_what_timm_makes_of_it(fused, rate):
    model, variant = small_model(), Variant(rate)
    for block in model.blocks:
        block.attn.scale *= 3  # as pruning may leave it: no longer head_dim ** -0.5
        block.attn.fused_attn = fused
    images = pictures(model)
    logits = agree(Graph(model, variant, images=3), model, images, variant)
    if rate == 0:
        torch.testing.assert_close(logits, model(images), rtol=0, atol=1e-4)


@pytest.mark.parametrize("rate", [0, 4])
def test_one_graph_serves_every_delta_and_every_task(rate):
    model = small_model("deit3_small")
    images = pictures(model)
    plain = Graph(model, Variant(rate), 3)
    tuned = Graph(model, Variant(rate, adapter=adapter(model)), 3)
    seen = []
    for change in (None, delta(model, 1), delta(model, 2), None):
        seen.append(agree(plain, model, images, Variant(rate, change)))
        tasks = [Variant(rate, change, adapter(model, seed)) for seed in (1, 2)]
        seen += [agree(tuned, model, images, task) for task in tasks]
    first, last = seen[:3], seen[-3:]
    for before, after in zip(first, last, strict=True):
        assert torch.equal(before, after)
    # That they agree would mean little if nothing had changed.
    assert min((a - b).abs().max() for i, a in enumerate(seen[:9]) for b in seen[:i]) > 1e-3


def test_the_bundled_model_with_its_bank():
    backbone = load_backbone("bundled:deit_tiny")
    bank = open_bank("bundled:deit_tiny_bank")
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, 3, 224, 224, generator=generator)
    for rate in (0, 2, 4):
        folded = fold(backbone.model, compose(bank, 4, rate)) if rate != 4 else None
        variant = Variant(rate, folded, ladder=bank.ladder)
        agree(Graph(backbone.model, variant, 2, threads=1), backbone.model, images, variant)


def test_what_it_returns_is_not_overwritten_by_the_next_call():
    model, variant = small_model(), Variant(2)
    graph = Graph(model, variant, 3)
    with torch.inference_mode():
        first = graph(pictures(model), variant)
        kept = first.features.clone(), first.logits.clone()
        graph(1 + pictures(model), variant)
    assert torch.equal(first.features, kept[0])
    assert torch.equal(first.logits, kept[1])


def test_a_graph_keeps_no_weights_of_a_delta_that_is_gone():
    model = small_model("deit3_small")
    images, change = pictures(model), delta(model)
    graph = Graph(model, Variant(0), 3)
    graph(images, Variant(0, change))
    held = [weakref.ref(tensor) for tensor in graph._bound._tensors]
    assert all(tensor() is not None for tensor in held)
    del change
    assert not any(tensor() is not None for tensor in held)
    agree(graph, model, images, Variant(0, delta(model, 1)))


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"mlp_layer": timm.layers.SwiGLU}, "two layers and an activation"),
        ({"act_layer": "relu"}, "not GELU"),
        ({"norm_layer": "rmsnorm"}, "is not LayerNorm"),
        ({"dynamic_img_size": True}, "any size"),
        ({"embed_norm_layer": "layernorm"}, "patches are normed"),
    ],
)
def test_models_without_graphs_say_why(arguments, reason):
    model = timm.create_model("vit_tiny_patch16_224", depth=1, **arguments)
    assert reason in unsupported(model)


def test_graphs_are_for_fp32():
    assert "fp32" in unsupported(small_model().bfloat16())


def test_bfloat16_stays_within_what_it_rounds():
    """Each layer rounds to 8 bits; over three blocks that adds up to a few thousandths."""
    model = small_model()
    images = pictures(model)
    stock, variant = Variant(), Variant(0, delta(model))
    exact = Graph(model, stock, 3)(images, stock).features
    rough = Graph(model, variant, 3, dtype=torch.bfloat16)(images, variant).features
    assert not torch.allclose(exact, rough, rtol=0, atol=0.1)  # the delta was not forgotten
    changed = Graph(model, variant, 3)(images, variant).features
    assert (rough - changed).abs().max() < 2**-8 * 8 * changed.abs().max()


def test_all_graphs_of_a_process_have_one_core(monkeypatch):
    """With several of them, one Ctrl-C in two crashed this suite."""
    made, core = [], openvino.Core
    monkeypatch.setattr(openvino, "Core", lambda: made.append(core()) or made[-1])
    for rate in range(3):
        Graph(small_model(), Variant(rate), 1)
    assert len(made) <= 1  # another test may have made it
