"""Graphs whose linear layers are in int8: near fp32, and nothing else is rounded."""

import pytest
import torch

from adapters import compose, open_bank
from server.int8.processor import lacks_int8
from tests.tocom_models import pictures, small_model
from tocom import Variant, fold, load_backbone
from tocom.engines import openvino as engine
from tocom.engines.openvino import Graph, measure

#: How far logits may be off, as a share of them. Without instructions for products of bytes, x86
#: adds them in 16 bits, which overflow now and then: the server makes no such graphs there.
NEAR = 0.12 if lacks_int8() else 0.06


def pair(model, variant, images):
    """Return the logits of a graph in fp32 and of one in int8, fitted to the same images."""
    ranges = measure(model, variant, [images], threads=1)
    size = len(images)
    graphs = Graph(model, variant, size, 1), Graph(model, variant, size, 1, ranges=ranges)
    with torch.inference_mode():
        return [graph(images, variant).logits for graph in graphs]


@pytest.mark.parametrize("kind", ["vit_tiny", "deit_tiny_distilled", "deit3_small", "qk_norm"])
def test_models_are_near_their_answers_in_fp32(kind):
    model = small_model(kind)
    whole, rounded = pair(model, Variant(0), pictures(model))
    assert not torch.equal(whole, rounded)
    assert (whole - rounded).norm() < NEAR * whole.norm()


def test_the_bounds_are_the_means_of_what_layers_read():
    model = small_model()
    batches = pictures(model, 4).split(2)
    read = []
    layer = model.blocks[1].mlp.fc1
    layer.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0]))
    with torch.inference_mode():
        for batch in batches:
            model(batch)
    ranges = measure(model, Variant(0), batches, threads=1)
    assert len(ranges) == 6 * len(model.blocks)
    expected = [sum(bound(x).item() for x in read) / 2 for bound in (torch.amin, torch.amax)]
    assert ranges["blocks.1.mlp.fc1"] == pytest.approx(expected, abs=1e-4)


def test_the_bundled_model_answers_alike_with_its_bank():
    backbone, bank = load_backbone("bundled:deit_tiny"), open_bank("bundled:deit_tiny_bank")
    model, images = backbone.model, 0.5 * pictures(backbone.model, 2)
    for rate in (0, 4):
        scale = bank.multiplier(backbone, 0, rate)
        delta = fold(model, compose(bank, 0, rate, scale)) if rate else None
        variant = Variant(rate, delta, ladder=bank.ladder)
        whole, rounded = (logits.log_softmax(-1) for logits in pair(model, variant, images))
        assert (whole.exp() * (whole - rounded)).sum(-1).mean() < 0.05


def test_the_weights_of_a_delta_are_the_graph_s_own():
    model, images = small_model(), pictures(small_model())
    ranges = measure(model, Variant(0), [images], threads=1)
    graph = Graph(model, Variant(0), len(images), 1, ranges=ranges)
    assert len(graph._compiled.inputs) == 1
    with torch.inference_mode():
        before = graph(images, Variant(0)).logits
        model.blocks[0].mlp.fc1.weight.mul_(2)
        torch.testing.assert_close(graph(images, Variant(0)).logits, before)


def test_similarities_are_not_rounded(monkeypatch):
    model, images = small_model(), pictures(small_model())
    ranges, built = measure(model, Variant(3), [images], threads=1), []
    core = engine._core()

    class Watching:
        def compile_model(self, graph, *options):
            built.append(graph)
            return core.compile_model(graph, *options)

    monkeypatch.setattr(engine, "_core", Watching)
    Graph(model, Variant(3), len(images), 1, ranges=ranges)
    products = {"whole": 0, "rounded": 0}
    for operation in built[0].get_ops():
        if operation.get_type_name() == "MatMul":
            sources = [value.get_node().get_type_name() for value in operation.input_values()]
            products["rounded" if "FakeQuantize" in sources else "whole"] += 1
    # Of each block six layers; where tokens merge the mean of their keys, and similarities.
    assert products == {"rounded": 18, "whole": 2 + 2}


def test_a_layer_that_reads_zeros_alone_is_no_trouble():
    model = small_model()
    model.blocks[0].norm1.weight.zero_()
    model.blocks[0].norm1.bias.zero_()
    model.blocks[1].attn.proj.weight.zero_()
    whole, rounded = pair(model, Variant(0), pictures(model))
    assert rounded.isfinite().all()
    assert (whole - rounded).norm() < NEAR * whole.norm()
