"""Banks of format 2, for ladders of their own: what they say, and every fault of it by name."""

import json

import pytest
import torch

from adapters import BackboneInfo, Bank, Store, compose, export_peft, model_card
from adapters.bank import FILES, ladder_entries, read_info
from adapters.card import facts
from adapters.ladder import LadderPart, MethodInfo, digest
from tests.adapters.banks import RUNGS, backbone_of, random_bank, same
from tests.tocom_models import pictures, small_model
from tocom import TOME, BankError, Ladder, RateError, forward
from tocom.reduction import ToMe, options_of

BANK = random_bank(ladder=RUNGS)
#: For models of three blocks and sixteen patches.
SMALL = Ladder("small", ToMe(), ((0, 0, 0), (0, 2, 1), (1, 3, 2), (4, 3, 2)), 16)


@pytest.fixture
def folder(tmp_path):
    return BANK.save(tmp_path / "bank")


def test_a_bank_carries_its_ladder(folder):
    loaded = Bank.load(folder)
    assert same(loaded, BANK)
    assert loaded.ladder == RUNGS
    assert loaded.info.format_version == 2
    said = json.loads((folder / FILES[0]).read_text())
    assert said["ladder"] == {
        "name": "uneven",
        "method": {"name": "tome", "options": options_of(ToMe())},
        "patches": 4,
        "rungs": [[0, 0], [0, 1], [1, 1], [2, 1]],
    }
    assert read_info(folder) == BANK.info


def test_a_bank_for_the_papers_ladder_is_of_format_1(tmp_path):
    bank = random_bank()
    assert bank.ladder == TOME
    assert ladder_entries(TOME) == ladder_entries(Ladder("another name", ToMe())) == {}
    said = json.loads((bank.save(tmp_path / "bank") / FILES[0]).read_text())
    assert (said["format_version"], said["method"]) == (1, "tome")
    assert "ladder" not in said


def test_a_ladder_without_rungs_may_be_another():
    bank = random_bank(ladder=Ladder("wide", ToMe(), None, 196))
    assert bank.info.format_version == 2
    assert bank.ladder.top is None


def test_the_digest_of_format_2_never_changes():
    ones = {name: torch.ones_like(tensor) for name, tensor in BANK.tensors.items()}
    # A file says the options that its method had then.
    part = BANK.info.ladder.model_copy(update={"method": MethodInfo(name="tome")})
    bank = Bank(BANK.info.model_copy(update={"digest": "", "ladder": part}), ones)
    assert bank.ladder == RUNGS
    assert bank.info.digest == ("556b1488e99cdf7f61010533d0f8fe5637ecc2bd1c27adca5f4f50cf2a45c8d5")


def test_the_digest_is_of_what_the_ladder_does_not_of_its_name():
    def of(**changes: object) -> str:
        said = {"method": RUNGS.method, "rungs": RUNGS.rungs, "patches": RUNGS.patches}
        ladder = Ladder(**({"name": "uneven"} | said | changes))
        return random_bank(ladder=ladder).info.digest

    assert of(name="other") == of() == BANK.info.digest
    assert of(patches=9) != of()
    assert of(rungs=((0, 0), (0, 1), (1, 1), (1, 2))) != of()
    assert random_bank().info.digest != of()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 1}, "a bank of format 1 has no ladder of its own"),
        ({"ladder": None}, "a bank of format 2 must say its ladder"),
        ({"method": "magic"}, "the method of the ladder 'uneven' is 'tome', not 'magic'"),
        ({"max_rate": 2}, "max_rate must be the last rung of the ladder 'uneven', 3, got 2"),
    ],
)
def test_what_does_not_go_with_the_ladder_is_refused(folder, changes, message):
    refuse(folder, changes, message)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "../up"}, "ladder.name: .*pattern"),
        ({"evidence": {}}, "ladder.evidence: Extra inputs"),
        ({"method": {"name": "magic"}}, "ladder: .*there is no method 'magic'; there are "),
        ({"method": {"name": "tome", "options": {"x": 1}}}, "ladder: .*has no option 'x'"),
        (
            {"method": {"name": "dtem", "options": {"channels": 2**62}}},
            "ladder.method.options: .*'channels' must be nearer to 0 than 1,048,576",
        ),
        ({"rungs": [[0, 1], [1, 1]]}, "ladder: .*rung 0 .* must be the stock model"),
        ({"rungs": [[0, 0], [1, 1]]}, "max_rate must be the last rung .* 1, got 3"),
        ({"rungs": [[0]] * 4}, "'uneven' is for 1 blocks, the backbone has 2"),
        ({"rungs": None, "patches": 0}, "is the paper's, which is that of files that name none"),
        ({"rungs": [[0, 0], [0, 1], [1, 1], [2, 2]]}, "does not match its digest"),
        ({"patches": 16}, "does not match its digest"),
        ({"name": "renamed"}, None),
    ],
)
def test_a_faulty_ladder_is_refused(folder, changes, message):
    said = LadderPart.describe(RUNGS).model_dump(mode="json")
    refuse(folder, {"ladder": said | changes}, message)


def refuse(folder, changes, message):
    file = folder / FILES[0]
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    if message is None:
        assert Bank.load(folder).info.digest == BANK.info.digest
        return
    with pytest.raises(BankError, match=message):
        Bank.load(folder)


def test_a_bank_runs_on_its_ladder_and_no_further():
    model = small_model()
    backbone = backbone_of(model)
    bank = random_bank(BackboneInfo.of(backbone), ladder=SMALL)
    bank.check_fits(backbone)
    images = pictures(model)
    delta = compose(bank, 0, 2)
    logits = forward(model, images, 2, delta, ladder=bank.ladder)
    assert not torch.equal(logits, forward(model, images, 2, delta))
    with pytest.raises(RateError, match=r"target rate must be in 0\.\.3, got 4"):
        compose(bank, 0, 4)


def test_a_bank_is_not_for_a_model_that_cannot_run_its_ladder(monkeypatch):
    model = small_model()
    bank = random_bank(BackboneInfo.of(backbone_of(model)), ladder=SMALL)
    monkeypatch.setattr(ToMe, "refuse", lambda method, model: "the method wants another model")
    with pytest.raises(BankError, match="'tiny' does not fit small: the method wants another"):
        bank.check_fits(backbone_of(model))


def test_a_store_keeps_it(tmp_path):
    store = Store(tmp_path / "store")
    reference = store.publish(BANK)
    assert same(store.get(reference), BANK)
    assert store.verify() == {}


def test_the_card_names_its_ladder():
    assert ("ladder", f"uneven, {digest(RUNGS)[:12]}") in list(facts(BANK))
    text = model_card(BANK, "org/bank").text
    assert "Reducing tokens by `tome` makes the model cheaper, at any rate from 0 to 3" in text
    assert "rate=3, delta=delta, ladder=bank.ladder)" in text
    assert "ladder" not in dict(facts(random_bank()))


def test_a_delta_of_it_goes_to_peft(tmp_path):
    assert export_peft(BANK, 0, 3, tmp_path / "lora").is_dir()
