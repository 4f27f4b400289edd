"""Models and banks whose merged tokens do not count in attention by their size."""

import json
from pathlib import Path

import pytest
import torch
from timm.models import save_for_hf

from adapters import Bank, compose, open_bank
from server.banks.catalogue import Change
from server.banks.routes import _change
from server.models.loading import load_model
from server.models.served import ServedModel
from server.settings import ModelSettings
from tests.adapters.test_task import random_task
from tests.tocom_models import small_model
from tocom import BackboneError, BankError, forward, load_backbone


@pytest.fixture
def bank_off(tiny: ModelSettings, tmp_path: Path) -> Bank:
    """The bank of `tiny`, said to be for attention that is not proportional."""
    assert tiny.bank is not None
    bank = open_bank(tiny.bank)
    info = bank.info.model_copy(update={"proportional": False, "digest": ""})
    off = Bank(info, bank.tensors)
    off.save(tmp_path / "off")
    return off


def logits(
    model: ServedModel, rate: int, images: torch.Tensor, trace: bool = False
) -> torch.Tensor:
    return torch.stack([output.logits for output in model.at(rate, True, trace)(images)])


@pytest.mark.parametrize("trace", [True, False])
def test_a_bank_decides_how_the_model_runs(
    tiny: ModelSettings, bank_off: Bank, tmp_path: Path, trace: bool
) -> None:
    served = load_model(tiny.model_copy(update={"bank": str(tmp_path / "off")}))
    images = torch.randn(2, 3, 64, 64)
    model, delta = load_backbone(tiny.backbone).model, compose(bank_off, 0, 4)
    expected, other = (forward(model, images, 4, delta, proportional=p) for p in (False, True))
    answer = logits(served, 4, images, trace)
    torch.testing.assert_close(answer, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(answer, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["task", "model"])
def test_without_a_bank_a_folder_says_it(tiny: ModelSettings, tmp_path: Path, kind: str) -> None:
    alone = tiny.model_copy(update={"bank": None})
    if kind == "task":
        task = random_task(load_backbone(tiny.backbone), proportional=False)
        task.save(tmp_path / "task")
        served = load_model(alone.model_copy(update={"task": str(tmp_path / "task")}))
    else:
        said = {"source_rate": 2, "proportional": False}
        save_for_hf(small_model(), tmp_path, model_config=said, safe_serialization=True)
        served = load_model(alone.model_copy(update={"backbone": str(tmp_path)}))
    images = torch.randn(2, 3, 64, 64)
    own = served.backbone
    expected = forward(own.model, images, 4, adapter=own.adapter, proportional=False)
    torch.testing.assert_close(logits(served, 4, images), expected, rtol=1e-4, atol=1e-4)


def test_a_bank_for_the_other_attention_is_refused_or_warned_of(
    tiny: ModelSettings, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for source in (0, 2):
        task = random_task(load_backbone(tiny.backbone), proportional=False, source=source)
        task.save(tmp_path / f"{source}")
    with pytest.raises(BankError, match="colours was tuned at rate 2 with attention that is not"):
        load_model(tiny.model_copy(update={"task": str(tmp_path / "2")}))
    warned = "with the bank it runs as the bank says"
    assert warned not in caplog.text
    served = load_model(tiny.model_copy(update={"task": str(tmp_path / "0")}))
    assert warned in caplog.text
    assert warned in str(_change(Change(None, served)).warning)
    assert served.proportional
    assert not served.with_bank(None).proportional


def test_a_folder_says_yes_or_no(tmp_path: Path) -> None:
    save_for_hf(small_model(), tmp_path, safe_serialization=True)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"proportional": "no"}))
    with pytest.raises(BackboneError, match="proportional must be true or false, got 'no'"):
        load_backbone(str(tmp_path))
