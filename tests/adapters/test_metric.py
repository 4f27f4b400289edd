"""A bank that has a metric of its own: what it holds, and that it goes where the bank goes."""

from pathlib import Path

import pytest
import torch

from adapters import BackboneInfo, Bank, compose, export_model, model_card
from adapters.bank import learned_with
from tests.adapters.banks import random_bank, same
from tests.adapters.test_export import run, small_backbone
from tests.tocom_models import pictures
from tocom import TOME, ConfigError, Ladder, ReductionError, forward, trace
from tocom.reduction import DTEM

#: Block 0 acts on the last rung alone.
LADDER = Ladder("learned", DTEM(importance=0.05, channels=3), ((0, 0), (0, 4), (0, 6), (5, 5)), 16)


def bank_of(ladder: Ladder = LADDER) -> Bank:
    return random_bank(BackboneInfo.of(small_backbone()), ladder=ladder)


def test_it_has_a_linear_layer_for_each_block_in_which_a_rung_acts(tmp_path: Path) -> None:
    bank = bank_of()
    metric = {name: x.shape for name, x in bank.tensors.items() if not name.startswith("blocks.")}
    assert metric == {
        f"reduction.{i}.{part}": shape
        for i in range(2)
        for part, shape in (("weight", (3, 192)), ("bias", (3,)))
    }
    assert bank.parameters - bank.plugins == 2 * 3 * 193
    assert same(Bank.load(bank.save(tmp_path / "bank")), bank)
    never = bank_of(Ladder("learned", LADDER.method, ((0, 0), (0, 4), (0, 6), (0, 8)), 16))
    assert "reduction.0.weight" not in never.tensors
    everywhere = bank_of(Ladder("learned", LADDER.method))  # as on the paper's ladder
    assert "reduction.0.weight" in everywhere.tensors


def test_a_metric_is_the_banks_and_other_banks_leave_the_models_own() -> None:
    backbone, bank = small_backbone(), bank_of()
    learned = learned_with(backbone, bank)
    assert learned is not None
    assert torch.equal(learned.tensors["1.bias"], bank.tensors["reduction.1.bias"])
    assert bank_of(TOME).learned("cpu") is None
    assert learned_with(backbone, bank_of(TOME)) is None
    assert learned_with(backbone, None) is None


def test_deltas_are_those_of_the_plugins_alone() -> None:
    bank = bank_of()
    plain = {name: x for name, x in bank.tensors.items() if name.startswith("blocks.")}
    for source, target in ((0, 3), (2, 1)):
        delta = compose(bank, source, target)
        assert {name for pair in delta.pairs for name in (f"{pair}.A", f"{pair}.B")} == set(plain)


def test_tokens_merge_as_the_metric_says() -> None:
    backbone, bank = small_backbone(), bank_of()
    images = pictures(backbone.model)
    learned = learned_with(backbone, bank)
    assert learned is not None
    one = trace(backbone.model, images, 3, ladder=LADDER, learned=learned)
    assert one.plan.removed == (5, 5)
    other = bank.learned("cpu")
    assert other is not None
    tensors = {name: x + 0.5 for name, x in other.tensors.items()}
    two = trace(
        backbone.model, images, 3, ladder=LADDER, learned=type(other)(other.method, tensors)
    )
    assert not torch.equal(one.source, two.source)
    with pytest.raises(ReductionError, match="'dtem' runs with weights .* distil a bank"):
        forward(backbone.model, images, 3, ladder=LADDER)


def test_its_card_says_how_it_runs() -> None:
    text = model_card(bank_of(), "org/bank").text
    assert 'delta=delta, ladder=bank.ladder, learned=bank.learned("cpu"))' in text
    assert "learned=" not in model_card(bank_of(TOME), "org/bank").text


def test_a_file_has_the_metric_in_it(tmp_path: Path) -> None:
    backbone, bank = small_backbone(), bank_of()
    path = export_model(backbone, 3, tmp_path / "model.onnx", bank)
    images = pictures(backbone.model)
    expected = forward(
        backbone.model, images, 3, compose(bank, 0, 3), ladder=LADDER,
        learned=learned_with(backbone, bank),
    )  # fmt: skip
    found = torch.from_numpy(run(path, images)["logits"])
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)
    with pytest.raises((ConfigError, ReductionError), match="distil a bank"):
        export_model(backbone, 3, tmp_path / "other.onnx", ladder=LADDER)
