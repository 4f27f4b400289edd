"""Which ladders a model is served on, and what it does on each."""

import json
import shutil

import pytest
import torch
from timm.models import save_for_hf

from adapters import BackboneInfo, Bank, BankInfo
from adapters.bank import ladder_entries, learned_with, tensor_shapes
from adapters.ladder import LadderInfo, write_ladder
from server.models.loading import load_model
from server.settings import ModelSettings
from tests.server.conftest import MAX_RATE
from tests.server.ladders import CLUSTERS, RINGS, UNEVEN, on_ladders
from tests.tocom_models import small_model
from tocom import TOME, ConfigError, Ladder, cost, forward, load_backbone
from tocom.reduction import DTEM, AroundMLP, Pattern


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(3))


@pytest.fixture
def several(tiny, tmp_path):
    return load_model(on_ladders(tiny, tmp_path, "tome", "uneven", "rings"))


@pytest.fixture
def bank_of(model_folder, tmp_path):
    """Makes the folder of a bank for a ladder."""

    def make(ladder: Ladder) -> str:
        info = BankInfo(
            **ladder_entries(ladder),
            name=f"for-{ladder.name}",
            backbone=BackboneInfo.of(load_backbone(str(model_folder))),
            max_rate=MAX_RATE if ladder.top is None else ladder.top,
            rank=2,
            targets=("q",),
            scale=1.0,
        )
        torch.manual_seed(2)
        tensors = {name: 0.1 * torch.randn(shape) for name, shape in tensor_shapes(info).items()}
        return str(Bank(info, tensors).save(tmp_path / info.name))

    return make


def logits(work, images):
    return torch.stack([output.logits for output in work(images)])


def test_by_default_it_is_the_papers(tiny, served):
    assert served.ladders == (served,)
    assert served.ladder == TOME
    bare = load_model(tiny.model_copy(update={"bank": None}))
    assert bare.ladder == TOME


@pytest.mark.parametrize("names", [("rings", "tome"), ("tome", "uneven", "rings")])
def test_the_first_is_the_default_and_each_has_its_name(tiny, tmp_path, names):
    model = load_model(on_ladders(tiny, tmp_path, *names))
    assert tuple(each.ladder.name for each in model.ladders) == names
    assert model.on(None) is model
    for name, each in zip(names, model.ladders, strict=True):
        assert model.on(name) is each


def test_each_runs_at_its_own_rates_for_its_own_costs(several, images):
    backbone = several.backbone.model
    for each, ladder in zip(several.ladders[1:], (UNEVEN, RINGS), strict=True):
        assert each.max_rate == ladder.top
        for rate in range(each.max_rate + 1):
            assert each.costs[rate] == cost(backbone, rate, ladder=ladder)
            expected = forward(backbone, images, rate, ladder=ladder)
            torch.testing.assert_close(logits(each.at(rate, True), images), expected)
            traced = logits(each.at(rate, True, trace=True), images)
            torch.testing.assert_close(traced, expected)


def test_works_on_two_ladders_are_two_and_so_are_their_times(several):
    works = {each.at(1, compensate=False) for each in several.ladders}
    assert len(works) == 3
    several.on("rings").controller.times.measured(1, 1, 0.5)
    assert several.controller.times.batch(1, 1) == 0


def test_a_bank_is_for_its_own_ladder_only(several, images):
    assert several.repaired is several
    assert several.at(1, True).compensate
    for each in several.ladders[1:]:
        assert each.bank is None
        assert not each.at(1, True).compensate


def test_the_ladder_of_a_bank_is_the_default(tiny, bank_of, images):
    model = load_model(tiny.model_copy(update={"bank": bank_of(UNEVEN)}))
    assert model.ladder == UNEVEN
    assert (model.max_rate, model.repaired) == (3, model)
    compensated = logits(model.at(2, True), images)
    expected = forward(model.backbone.model, images, 2, model.delta(2), ladder=UNEVEN)
    torch.testing.assert_close(compensated, expected, atol=1e-4, rtol=1e-4)


def test_the_bank_of_another_ladder_than_the_default_one(tiny, bank_of, tmp_path):
    settings = tiny.model_copy(update={"bank": bank_of(UNEVEN), "ladders": ("tome", "bank")})
    model = load_model(settings)
    assert (model.bank, model.max_rate) == (None, 16 // 3)
    assert model.repaired is model.on("uneven")
    assert model.on("uneven").at(1, True).compensate
    # What the bank calls its ladder does not matter: what it does, does.
    renamed = Ladder("renamed", UNEVEN.method, UNEVEN.rungs, UNEVEN.patches)
    assert load_model(
        on_ladders(settings.model_copy(update={"bank": bank_of(renamed)}), tmp_path, "uneven")
    ).bank


def test_another_bank_may_be_for_another_of_the_ladders(several, bank_of):
    new = several.with_bank(Bank.load(bank_of(UNEVEN)))
    assert [each.bank is None for each in new.ladders] == [True, False, True]
    for after, before in zip(new.ladders, several.ladders, strict=True):
        assert after.controller is before.controller
    assert all(each.bank is None for each in new.with_bank(None).ladders)
    with pytest.raises(
        ConfigError,
        match=r"for the ladder 'clusters', .* not served; its ladders are: tome, uneven, rings",
    ):
        several.with_bank(Bank.load(bank_of(CLUSTERS)))


def test_a_source_is_a_rate_of_one_ladder(tiny, tmp_path, bank_of):
    settings = on_ladders(tiny.model_copy(update={"source": 3}), tmp_path, "rings", "tome")
    model = load_model(settings)
    assert [each.source for each in model.ladders] == [0, 3]
    settings = on_ladders(tiny.model_copy(update={"source": 3}), tmp_path, "tome", "uneven")
    tuned = load_model(settings)
    with pytest.raises(ConfigError, match=r"tuned on another one, 'tome', at rate 3"):
        tuned.with_bank(Bank.load(bank_of(UNEVEN)))


def test_a_model_says_on_which_ladder_it_was_tuned(tiny, model_folder, tmp_path):
    folder = shutil.copytree(model_folder, tmp_path / "tuned")
    config = json.loads((folder / "config.json").read_text())
    ladder = LadderInfo.of(UNEVEN).model_dump(mode="json")
    (folder / "config.json").write_text(json.dumps(config | {"source_rate": 2, "ladder": ladder}))
    settings = ModelSettings(name="tuned", backbone=str(folder))
    model = load_model(settings)
    assert (model.ladder, model.source, model.backbone.source) == (UNEVEN, 2, 2)
    with pytest.raises(ConfigError, match="was tuned at rate 2 of the ladder 'uneven': name that"):
        load_model(settings.model_copy(update={"bank": tiny.bank}))


def test_a_model_that_was_tuned_on_a_ladder_that_is_not_named(tiny, tmp_path):
    update = {"source": 3, "ladders": (str(tmp_path / "rings"),)}
    on_ladders(tiny, tmp_path)
    with pytest.raises(ConfigError, match=r"was tuned at rate 3 of the ladder 'tome': name that"):
        load_model(tiny.model_copy(update=update))


def test_ladders_that_cannot_be_had(tiny, tmp_path):
    on_ladders(tiny, tmp_path)
    said = json.loads((tmp_path / "rings" / "ladder.json").read_text())

    def refused(name: str, **changes) -> str:
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(said | {"name": name} | changes))
        with pytest.raises(ConfigError, match="model 'tiny': ") as raised:
            load_model(tiny.model_copy(update={"ladders": ("tome", str(path))}))
        return str(raised.value)

    assert "there is no method 'nix'; there are tome, " in refused("a", method={"name": "nix"})
    assert "is for 2 blocks, the model has 3" in refused("b", rungs=[[0, 0], [1, 1]])
    assert "rung 0 of the ladder 'c' must be the stock model" in refused("c", rungs=[[1, 1, 1]])
    assert "two of its ladders are called 'tome'" in refused("tome")
    assert "is no ladder: format_version" in refused("d", format_version=7)
    for ladders, message in (
        (("nix.json",), "cannot read the ladder nix.json: No such file"),
        (("tome", "bank"), "two of its ladders are called 'tome'"),
        ((str(tmp_path / "rings"), str(tmp_path / "a.json")), "there is no method 'nix'"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_model(tiny.model_copy(update={"ladders": ladders}))
    bare = tiny.model_copy(update={"bank": None, "ladders": ("bank",)})
    with pytest.raises(ConfigError, match="'bank' is that of its bank, and it has none"):
        load_model(bare)


def test_the_same_ladder_by_two_names(tiny, tmp_path):
    settings = on_ladders(tiny, tmp_path, "tome", "rings", "rings")
    path = tmp_path / "again.json"
    path.write_text((tmp_path / "rings" / "ladder.json").read_text().replace("rings", "again"))
    settings = settings.model_copy(update={"ladders": (*settings.ladders[:2], str(path))})
    with pytest.raises(ConfigError, match="its ladders 'rings' and 'again' are the same"):
        load_model(settings)


def test_a_backbone_that_cannot_have_the_method(tmp_path, monkeypatch):
    save_for_hf(small_model(), tmp_path / "model", safe_serialization=True)
    settings = ModelSettings(name="m", backbone=str(tmp_path / "model"))
    monkeypatch.setattr(Pattern, "refuse", lambda self, model: "the model is too odd for 'pattern'")
    with pytest.raises(ConfigError, match="model 'm': the model is too odd for 'pattern'"):
        load_model(on_ladders(settings, tmp_path, "rings"))


def test_a_learned_metric_comes_with_its_bank(tiny, bank_of, images):
    ladder = Ladder("learned", DTEM(channels=6), UNEVEN.rungs, UNEVEN.patches)
    model = load_model(tiny.model_copy(update={"bank": bank_of(ladder)}))
    assert model.ladder == ladder
    for compensate in (False, True):
        delta = model.delta(2) if compensate else None
        learned = learned_with(model.backbone, model.bank)
        expected = forward(model.backbone.model, images, 2, delta, ladder=ladder, learned=learned)
        for traced in (False, True):
            work = model.at(2, compensate, traced)
            torch.testing.assert_close(logits(work, images), expected, atol=1e-4, rtol=1e-4)
    tensors = {name: -x if "weight" in name else x for name, x in model.bank.tensors.items()}
    other = Bank(model.bank.info.model_copy(update={"digest": ""}), tensors)
    assert not torch.equal(
        model.with_bank(other).learned.tensors["0.weight"], model.learned.tensors["0.weight"]
    )
    with pytest.raises(ConfigError, match="'dtem' runs with weights .* distil a bank"):
        model.with_bank(None)


def test_a_ladder_whose_metric_no_bank_has_is_refused(tiny, tmp_path):
    ladder = Ladder("learned", DTEM(channels=6), UNEVEN.rungs, UNEVEN.patches)
    path = write_ladder(LadderInfo.of(ladder), tmp_path / "ladder.json")
    with pytest.raises(ConfigError, match="'tiny'.*'dtem' runs with weights .* distil a bank"):
        load_model(tiny.model_copy(update={"ladders": ("tome", str(path))}))


def test_around_mlp_is_named_and_is_its_papers_ladder(tiny, images):
    settings = tiny.model_copy(update={"ladders": ("around-mlp", "tome"), "bank": None})
    model = load_model(settings)
    assert [each.ladder.name for each in model.ladders] == ["around-mlp", "tome"]
    assert model.max_rate == AroundMLP.steps == 16
    # All patches are there again at the end, for less.
    assert model.costs[16].plan.tokens[-1] == model.costs[0].plan.tokens[-1]
    assert model.costs[16].macs < model.costs[0].macs
    stock = load_backbone(settings.backbone).model
    expected = forward(stock, images, 16, ladder=model.ladder)
    outputs = model.at(16, compensate=True)(images)
    torch.testing.assert_close(
        torch.stack([each.logits for each in outputs]), expected, rtol=1e-4, atol=1e-4
    )
