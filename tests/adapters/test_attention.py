"""Banks and models for attention that is proportional, and for attention that is not."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from adapters import BackboneInfo, Bank, TaskModel, compose, model_card
from adapters.card import facts
from tests.adapters.banks import backbone_of, random_bank
from tests.adapters.test_task import random_task
from tests.tocom_models import pictures, small_model
from tocom import Backbone, BankError, forward

STOCK = backbone_of(small_model())
ON = random_bank(BackboneInfo.of(STOCK))
OFF = Bank(ON.info.model_copy(update={"proportional": False, "digest": ""}), ON.tensors)


def tuned(proportional: bool, source: int) -> Backbone:
    return random_task(STOCK, proportional=proportional, source=source).on(STOCK)


def test_a_task_is_run_with_the_attention_that_it_was_tuned_with(tmp_path: Path) -> None:
    task = random_task(STOCK, proportional=False)
    loaded = TaskModel.load(task.save(tmp_path / "task")).on(STOCK)
    assert (loaded.proportional, random_task(STOCK).on(STOCK).proportional) == (False, True)


@pytest.mark.parametrize("proportional", [True, False])
def test_a_bank_for_the_other_attention_is_refused_but_at_rate_0(proportional: bool) -> None:
    own, other = (ON, OFF) if proportional else (OFF, ON)
    own.check_fits(tuned(proportional, 2))
    message = "bank 'tiny' is for .*attention.*, and colours was tuned at rate 2 with .*attention"
    with pytest.raises(BankError, match=message):
        other.check_fits(tuned(proportional, 2))
    with pytest.warns(UserWarning, match="with the bank it runs as the bank says"):
        other.check_fits(tuned(proportional, 0))


def test_the_words_say_which_is_which() -> None:
    with pytest.raises(BankError, match="for attention that is not .* 2 with proportional attenti"):
        OFF.check_fits(tuned(True, 2))


def test_a_stock_model_has_no_say(recwarn: pytest.WarningsRecorder) -> None:
    for bank in (ON, OFF):
        bank.check_fits(STOCK)
        bank.check_fits(replace(STOCK, name="as if tuned"), source=2)
    assert not recwarn


def test_the_card_says_how_it_is_run() -> None:
    assert ("attention", "not proportional: merged tokens count as one") in list(facts(OFF))
    assert "attention" not in dict(facts(ON))
    assert "delta=delta, proportional=False)" in model_card(OFF, "org/bank").text
    images = pictures(STOCK.model)
    delta = compose(OFF, 0, 3)
    answers = [forward(STOCK.model, images, 3, delta, proportional=p) for p in (True, False)]
    assert not torch.allclose(*answers)
