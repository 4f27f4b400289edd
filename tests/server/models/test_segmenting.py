"""Tasks of segmentation as they are served: on the weights of others, and what they cost."""

import pytest
import torch

from adapters.segmentation import open_segmentation
from server.errors import ImageError
from server.models.loading import load_model, load_models
from server.models.segmenting import Scene, segmentation_cost
from server.settings import Settings
from tests.server.conftest import picture, png
from tests.server.segmenters import streets
from tocom import TOME, TaskError, Variant, cost


@pytest.fixture(scope="module")
def asked(tiny, tmp_path_factory):
    return streets(tiny, tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="module")
def models(tiny, asked):
    return load_models(Settings(models=(tiny, asked), device="cpu"))


def test_it_has_the_weights_of_the_others_and_what_is_folded(models):
    stock, segmenter = models
    assert segmenter.backbone.model is stock.backbone.model
    assert segmenter.delta(3) is stock.delta(3)
    assert (stock.kind, segmenter.kind) == ("classification", "segmentation")
    assert segmenter.class_names == ("road", "sky", "tree")


@pytest.mark.parametrize("rate", [0, 3])
def test_it_says_what_the_task_says_with_the_delta(models, asked, rate):
    segmenter = models[1]
    scene = Scene(png(picture(1, 200, 100)), segmenter, Settings())
    image = scene()
    assert scene.size == (100, 200)
    assert image.shape == (3, 64, 128)
    (scores,) = segmenter.at(rate, compensate=True)(image[None])
    own = open_segmentation(asked.task).on(models[0].backbone)
    delta = segmenter.delta(rate) if rate else None
    variant = Variant(rate, delta, own.backbone.adapter)
    torch.testing.assert_close(scores[None], own.scores(image[None], variant), atol=1e-4, rtol=0)
    assert torch.equal(scene.classes(scores)[None], own.classes(scores[None], (100, 200)))


def test_a_picture_costs_its_windows_and_the_decoder(models):
    segmenter = models[1]
    backbone, decoder = segmenter.backbone.model, segmenter.segmenter.decoder
    one, two = (segmenter.cost_of(2, (64, width)) for width in (64, 96))
    encoder = cost(backbone, 2, (64, 64), adapter=segmenter.backbone.adapter)
    assert one.macs == encoder.macs - encoder.head + decoder.macs(16)
    assert two.macs == 2 * one.macs
    assert segmenter.costs[2] == one == segmentation_cost(segmenter.segmenter, 2, (64, 64), TOME)
    assert segmenter.share(5) < segmenter.share(1) < 1


def test_a_line_is_refused_before_it_is_decoded(models):
    with pytest.raises(ImageError, match="its sides may differ by a factor of 8 at most"):
        Scene(png(picture(1, 90, 10)), models[1], Settings())()


def test_another_backbone_is_refused(asked):
    with pytest.raises(TaskError, match="'streets' was tuned on "):
        load_model(asked.model_copy(update={"backbone": "bundled:deit_tiny", "bank": None}))
