"""Pruned models are served as others are, with a bank and as graphs."""

from pathlib import Path

import pytest
import torch

from adapters import BackboneInfo, compose
from server.models.graphs import Graphs
from server.models.loading import load_model
from server.models.weights import Backbones
from server.settings import ModelSettings
from tests.adapters.banks import random_bank
from tests.tocom.test_pruned import pruned_model, saved
from tests.tocom_models import pictures
from tocom import forward, load_backbone


@pytest.mark.parametrize("graphs", [0, 8])
def test_a_pruned_model_is_served_with_its_bank(tmp_path: Path, graphs: int) -> None:
    folder = str(saved(tmp_path / "model", pruned_model()))
    backbone = load_backbone(folder)
    bank = random_bank(BackboneInfo.of(backbone))
    bank.save(tmp_path / "bank")
    settings = ModelSettings(name="pruned", backbone=folder, bank=str(tmp_path / "bank"))
    served = load_model(settings, Backbones("cpu", Graphs(graphs)))
    images = pictures(backbone.model)
    answers = torch.stack([each.logits for each in served.at(3, True)(images)])
    expected = forward(backbone.model, images, 3, compose(bank, 0, 3))
    torch.testing.assert_close(answers, expected, rtol=1e-3, atol=1e-3)
