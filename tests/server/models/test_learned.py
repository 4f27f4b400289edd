"""Tasks whose method is learned are served at every rung; without its weights none is."""

import pytest
import torch

from adapters.ladder import LadderInfo, LadderPart, write_ladder
from server.models.loading import load_model
from tests.adapters.test_task import random_task
from tocom import ConfigError, Ladder, forward, load_backbone
from tocom.reduction import DynamicViT, SiT

RUNGS = ((0, 0, 0), (0, 9, 0), (0, 6, 4))


@pytest.fixture
def alone(tiny):
    return tiny.model_copy(update={"bank": None})


@pytest.mark.parametrize("method", [DynamicViT(), SiT()], ids=repr)
def test_a_task_is_served_at_every_rung(alone, tmp_path, method):
    backbone = load_backbone(alone.backbone)
    depth = len(backbone.model.blocks)
    rungs = tuple((*rung[:depth], *(0,) * (depth - 3)) for rung in RUNGS)
    ladder = Ladder("learned", method, rungs, backbone.model.patch_embed.num_patches)
    said = LadderPart.describe(ladder).model_dump(mode="json")
    task = random_task(backbone, ladder=said)
    settings = alone.model_copy(update={"task": str(task.save(tmp_path / "task"))})
    served = load_model(settings)
    assert (served.ladder, served.max_rate, served.source) == (ladder, 2, 2)
    tuned = task.on(backbone)
    images = torch.randn(2, *served.input_size, generator=torch.Generator().manual_seed(3))
    for rate in range(3):
        expected = forward(
            tuned.model, images, rate, adapter=tuned.adapter, ladder=ladder, learned=tuned.learned
        )
        for trace in (False, True):
            answer = torch.stack([each.logits for each in served.at(rate, True, trace)(images)])
            torch.testing.assert_close(answer, expected)

    # On another ladder beside it there is nothing to learn; one that wants more is refused.
    both = load_model(settings.model_copy(update={"ladders": (_file(ladder, tmp_path), "tome")}))
    assert [each.ladder.name for each in both.ladders] == ["learned", "tome"]
    early = Ladder("early", method, ((0,) * depth, (9,) * depth), ladder.patches)
    ladders = _file(early, tmp_path), _file(ladder, tmp_path)
    with pytest.raises(ConfigError, match="has learned nothing for block 0, only for 1, 2"):
        load_model(settings.model_copy(update={"ladders": ladders}))


def test_a_stock_model_has_no_weights_for_it(alone, tmp_path):
    depth = len(load_backbone(alone.backbone).model.blocks)
    ladder = Ladder("sit", SiT(), ((0,) * depth, (9,) * depth), 16)
    with pytest.raises(ConfigError, match="'sit' runs with weights that are learned, and the mod"):
        load_model(alone.model_copy(update={"ladders": (_file(ladder, tmp_path),)}))


def _file(ladder, folder):
    return str(write_ladder(LadderInfo.of(ladder), folder / f"{ladder.name}.json"))
