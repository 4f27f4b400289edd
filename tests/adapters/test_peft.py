"""Deltas as adapters of PEFT."""

import json
import sys

import pytest
import torch
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer

from adapters import BackboneInfo, Bank, compose, export_peft
from tests.adapters.banks import ALL_TARGETS, backbone_of, random_bank
from tests.tocom_models import small_model
from tocom import BankError, RateError, TocomError, forward

IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def bank_of(model: VisionTransformer, targets: tuple[str, ...]) -> Bank:
    """Make a bank whose deltas are small against the model's weights."""
    bank = random_bank(BackboneInfo.of(backbone_of(model)), targets)
    small = {name: 0.1 * tensor for name, tensor in bank.tensors.items()}
    return Bank(bank.info.model_copy(update={"digest": ""}), small)


@pytest.mark.parametrize(
    ("kind", "targets", "rates"),
    [
        ("vit_tiny", ("q", "v"), (0, 3)),
        ("vit_tiny", ALL_TARGETS, (2, 1)),
        ("deit_tiny_distilled", ("k", "fc2"), (1, 3)),
        ("qk_norm", ("proj",), (3, 0)),
    ],
)
def test_stock_peft_gives_the_same_logits(tmp_path, kind, targets, rates):
    from peft import PeftModel

    model = small_model(kind)
    bank = bank_of(model, targets)
    expected = forward(model, IMAGES, 0, compose(bank, *rates))
    assert (expected - forward(model, IMAGES)).abs().max() > 1e-2
    folder = export_peft(bank, *rates, tmp_path / "lora")
    loaded = PeftModel.from_pretrained(model, folder).eval()
    torch.testing.assert_close(loaded(IMAGES), expected, rtol=0, atol=1e-4)


def test_the_files_are_those_of_peft(tmp_path):
    bank = random_bank(targets=("q", "v", "fc1"))
    folder = export_peft(bank, 0, 3, tmp_path / "lora")
    assert sorted(path.name for path in folder.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    config = json.loads((folder / "adapter_config.json").read_text())
    assert sorted(config["target_modules"]) == ["attn.qkv", "mlp.fc1"]
    assert (config["r"], config["lora_alpha"]) == (12, 12)
    assert config["rank_pattern"] == config["alpha_pattern"] == {"mlp.fc1": 6}
    tensors = load_file(folder / "adapter_model.safetensors")
    assert tensors["base_model.model.blocks.1.attn.qkv.lora_A.weight"].shape == (12, 4)
    up = tensors["base_model.model.blocks.1.attn.qkv.lora_B.weight"]
    assert up.shape == (12, 12)
    assert up[:4, :6].all()  # q
    assert up[8:, 6:].all()  # v
    assert up.count_nonzero() == 2 * 4 * 6


def test_export_refuses_what_it_cannot_do(tmp_path, monkeypatch):
    bank = random_bank()
    with pytest.raises(RateError, match=r"target rate must be in 0\.\.3, got 4"):
        export_peft(bank, 0, 4, tmp_path / "lora")
    with pytest.raises(RateError, match="both 2: there is no delta to export"):
        export_peft(bank, 2, 2, tmp_path / "lora")
    with pytest.raises(BankError, match="exists already"):
        export_peft(bank, 0, 1, tmp_path)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(TocomError, match=r"pip install 'tocom-serve\[peft\]'"):
        export_peft(bank, 0, 1, tmp_path / "lora")
    assert list(tmp_path.iterdir()) == []
