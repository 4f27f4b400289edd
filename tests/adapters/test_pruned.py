"""Banks and tasks for pruned models."""

import pytest
import torch
from pydantic import ValidationError

from adapters import BackboneInfo, Bank, Geometry, compose, export_peft
from tests.adapters.banks import ALL_TARGETS, backbone_of, random_bank
from tests.tocom.test_pruned import CHANNELS, pruned_model
from tests.tocom_models import pictures, small_model
from tocom import BankError, check_delta, forward


@pytest.fixture(scope="module")
def model():
    return pruned_model()


@pytest.fixture(scope="module")
def bank(model):
    return random_bank(BackboneInfo.of(backbone_of(model)), ALL_TARGETS)


def test_the_geometry_says_the_channels(model):
    geometry = Geometry.of(model)
    assert geometry.pruned is not None
    assert geometry.pruned.model_dump() == {
        "qk": CHANNELS.qk, "v": CHANNELS.v, "hidden": CHANNELS.hidden,
    }  # fmt: skip
    assert geometry.hidden == max(CHANNELS.hidden)
    assert "pruned" not in Geometry.of(small_model()).model_dump()


def test_a_bank_is_saved_loaded_and_fits(model, bank, tmp_path):
    loaded = Bank.load(bank.save(tmp_path / "bank"))
    assert loaded.info == bank.info
    loaded.check_geometry(backbone_of(model))
    check_delta(model, compose(loaded, 0, 3))
    assert forward(model, pictures(model), 3, compose(loaded, 0, 3)).isfinite().all()


def test_it_does_not_fit_the_model_before(bank):
    with pytest.raises(BankError, match=r"does not fit small: hidden 30 \(model: 768\), pruned"):
        bank.check_geometry(backbone_of(small_model()))


def test_other_channels_are_another_bank(model, bank):
    geometry = bank.info.backbone.geometry
    other = geometry.model_copy(
        update={"pruned": geometry.pruned.model_copy(update={"qk": (5, 64, 2)})}
    )
    backbone = bank.info.backbone.model_copy(update={"geometry": other})
    with pytest.raises(BankError, match=r"blocks\.2\.attn\.q\.B must be"):
        Bank(bank.info.model_copy(update={"backbone": backbone, "digest": ""}), bank.tensors)


def test_every_block_has_its_channels():
    said = Geometry.of(pruned_model()).model_dump()
    said["pruned"]["v"] = (1, 2)
    with pytest.raises(ValidationError, match=r"pruned\.v must have a number for each of 3 blocks"):
        Geometry.model_validate(said)


def test_stock_peft_takes_its_deltas(model, bank, tmp_path):
    peft = pytest.importorskip("peft")
    small = Bank(
        bank.info.model_copy(update={"digest": ""}),
        {name: 0.1 * tensor for name, tensor in bank.tensors.items()},
    )
    images = pictures(model)
    expected = forward(model, images, 0, compose(small, 0, 2))
    folder = export_peft(small, 0, 2, tmp_path / "lora")
    loaded = peft.PeftModel.from_pretrained(pruned_model(), folder).eval()
    torch.testing.assert_close(loaded(images), expected, rtol=0, atol=1e-4)
