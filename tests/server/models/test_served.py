import json
import math
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import FrozenInstanceError
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from timm.models import save_for_hf

from adapters import Bank, compose
from server.models.loading import load_model
from server.models.served import AutoWork, RateWork, ServedModel
from server.models.weights import Deltas
from server.settings import ModelSettings
from tests.server.conftest import CLASSES, MAX_RATE
from tests.tocom_models import small_model
from tocom import BackboneError, BankError, ConfigError, RateError, cost, forward, trace


def logits(work: RateWork, images: torch.Tensor) -> torch.Tensor:
    return torch.stack([output.logits for output in work(images)])


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(3))


def test_a_model_says_what_it_is(served: ServedModel):
    assert served.max_rate == MAX_RATE
    assert served.source == 0
    assert served.backbone.class_names == tuple(CLASSES)
    assert served.input_size == (3, 64, 64)
    assert served.costs == tuple(cost(served.backbone.model, r) for r in range(MAX_RATE + 1))


def test_without_a_bank_the_rates_are_those_that_no_block_clips(model_folder):
    model = load_model(ModelSettings(name="bare", backbone=str(model_folder)))
    assert model.max_rate == 16 // 3
    assert model.bank is None
    assert not any(model.costs[r].plan.clipped for r in range(5))


def test_a_handle_is_immutable_and_equal_to_itself_only(served, tiny):
    with pytest.raises(FrozenInstanceError):
        served.source = 3
    assert served == served
    assert served != load_model(tiny)
    assert served.at(3, True) == served.at(3, True)
    assert len({served.at(3, True), served.at(3, True), served.at(3, False)}) == 2


@given(st.integers(0, MAX_RATE))
def test_allowed_rates(served, rate):
    assert served.parse_rate(str(rate)) == rate


@given(st.text(max_size=50).filter(lambda text: text.lstrip("0") not in ("", *"12345")))
def test_other_rates_are_refused_and_the_allowed_ones_named(served, text):
    with pytest.raises(
        RateError, match="'tiny' runs at the rates 0 to 5, whole numbers, or auto; got rate="
    ):
        served.parse_rate(text)


@pytest.mark.parametrize(
    "text", ["", "abc", "auto", "-1", "6", "1.5", "+1", "1_0", "٣", "9" * 5000]
)
def test_such_rates_are_refused(served, text):
    with pytest.raises(RateError, match="0 to 5") as raised:
        served.parse_rate(text)
    assert len(str(raised.value)) < 150


@pytest.fixture(scope="module", params=[0, 3])
def tuned_at(request, tiny) -> ServedModel:
    return load_model(tiny.model_copy(update={"source": request.param}))


@pytest.mark.parametrize("rate", range(MAX_RATE + 1))
def test_the_folded_forward_is_the_low_rank_one(tuned_at, images, rate):
    served, source = tuned_at, tuned_at.source
    delta = compose(served.bank, source, rate)
    expected = forward(served.backbone.model, images, rate, delta)
    compensated = logits(served.at(rate, True), images)
    torch.testing.assert_close(compensated, expected, atol=1e-4, rtol=1e-4)
    plain = forward(served.backbone.model, images, rate)
    torch.testing.assert_close(logits(served.at(rate, False), images), plain)
    assert torch.allclose(compensated, plain, atol=1e-4, rtol=1e-4) == (rate == source)


def test_at_its_source_rate_a_model_is_the_stock_model(served, images):
    stock = served.backbone.model(images)
    torch.testing.assert_close(logits(served.at(0, True), images), stock)
    # Traced, no block is cut short, and not a bit differs.
    assert torch.equal(logits(served.at(0, True, trace=True), images), stock)


@pytest.mark.parametrize("rate", [0, 4])
def test_features_are_what_the_head_reads(served, images, rate):
    outputs = served.at(rate, True)(images)
    for output in outputs:
        assert output.source is None
        torch.testing.assert_close(served.backbone.model.head(output.features), output.logits)


def test_a_traced_forward_says_which_token_holds_each(served, images):
    work = served.at(4, compensate=True, trace=True)
    assert work != served.at(4, compensate=True)
    delta = compose(served.bank, 0, 4)
    traced = trace(served.backbone.model, images, 4, delta)
    for output, source in zip(work(images), traced.source, strict=True):
        assert torch.equal(output.source, source)
    assert served.grid == (4, 4)


def test_an_open_rate_becomes_an_exact_one(served):
    work = AutoWork(served, low=1, high=4, compensate=True)
    assert work.rate is None
    assert work.at(3) == served.at(3, True)
    assert AutoWork(served, 1, 4, True) == work != AutoWork(served, 1, 5, True)


def test_another_bank_is_another_handle_of_the_same_weights(served, bank_folder, tmp_path):
    bare = served.with_bank(None)
    assert bare.backbone is served.backbone
    assert bare.controller is served.controller
    assert not bare.at(3, True).compensate
    assert bare.with_bank(served.bank).at(3, True).compensate
    assert served.bank is not None


def test_a_warm_model_knows_how_long_it_takes(tiny):
    model = load_model(tiny)
    model.at(3, True).warm_up([1, 2])
    assert list(model._made) == [3]
    assert model.controller.times.batch(3, 2) > 0


def test_one_image_that_was_held_up_is_not_how_long_one_takes(tiny, monkeypatch, clock):
    seconds = [9.0, 5.0, 1.0, 3.0]  # what is made at first, one image, again, two images

    def run(work: RateWork, images: torch.Tensor) -> list[object]:
        clock.now += seconds.pop(0)
        return []

    monkeypatch.setattr(RateWork, "__call__", run)
    monkeypatch.setattr("server.models.served.time", SimpleNamespace(perf_counter=clock))
    model = load_model(tiny)
    model.at(3, True).warm_up([1, 2])
    assert [model.controller.times.batch(3, size) for size in (1, 2)] == [1.0, 3.0]


def test_where_no_delta_applies_the_work_is_the_uncompensated_one(served, model_folder):
    assert served.at(0, True) == served.at(0, False)
    assert served.at(2, True) != served.at(2, False)
    bare = load_model(ModelSettings(name="bare", backbone=str(model_folder)))
    assert bare.at(2, True) == bare.at(2, False)


def test_weights_are_folded_once_for_all_threads(tiny):
    served = load_model(tiny)
    with ThreadPoolExecutor(8) as pool:
        folded = list(pool.map(lambda i: served.delta(1 + i % MAX_RATE), range(40)))
    assert len({id(weights) for weights in folded}) == MAX_RATE


def test_no_bank_folder(tiny, tmp_path):
    with pytest.raises(BankError, match=r"is no bank: it has no bank\.json"):
        load_model(tiny.model_copy(update={"bank": str(tmp_path)}))


def test_nothing_bundled_of_that_name(tiny):
    with pytest.raises(BackboneError, match="nothing bundled is called 'nix'; there are: "):
        load_model(tiny.model_copy(update={"bank": "bundled:nix"}))


def test_a_bank_of_another_shape(tiny, tmp_path):
    model = small_model("vit_small")
    save_for_hf(model, tmp_path, safe_serialization=True)
    with pytest.raises(BankError, match=r"does not fit .*width 192 \(model: 384\)"):
        load_model(tiny.model_copy(update={"backbone": str(tmp_path)}))


@pytest.mark.parametrize("room", [0, math.inf])
def test_a_bank_whose_deltas_overflow_is_refused(served, room):
    huge = served.bank.info.model_copy(update={"scale": 1e39, "name": "huge", "digest": ""})
    bank, deltas = Bank(huge, served.bank.tensors), Deltas(served.backbone, room)
    with pytest.raises(BankError, match="bank 'huge': its delta 0→3 .* holds NaN or infinity"):
        deltas.get(bank, 0, 3, bank.info.scale)


def test_a_bank_of_other_weights_is_served_and_noted(tiny, tmp_path, caplog):
    save_for_hf(small_model(seed=9), tmp_path, safe_serialization=True)
    with caplog.at_level("INFO"):
        assert load_model(tiny.model_copy(update={"backbone": str(tmp_path)})).bank
    assert caplog.text.count("was distilled on other weights") == 1


@pytest.mark.parametrize("bank", [True, False])
def test_a_source_beyond_the_rates(tiny, bank):
    update = {"source": 6} if bank else {"source": 6, "bank": None}
    with pytest.raises(ConfigError, match=r"source rate must be in 0\.\.5, got 6"):
        load_model(tiny.model_copy(update=update))


def test_a_model_whose_configuration_disagrees_with_its_weights(tmp_path):
    save_for_hf(small_model(), tmp_path, safe_serialization=True)
    config = json.loads((tmp_path / "config.json").read_text())
    config["pretrained_cfg"] |= {"input_size": [3, 224, 224], "fixed_input_size": False}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(BackboneError, match=r"pictures of \(64, 64\) pixels, .* \(224, 224\)"):
        load_model(ModelSettings(name="m", backbone=str(tmp_path)))


def test_a_backbone_without_a_head(tmp_path):
    model = small_model()
    model.reset_classifier(0)
    save_for_hf(model, tmp_path, safe_serialization=True)
    with pytest.raises(ConfigError, match="has no classification head; tune it on a task first"):
        load_model(ModelSettings(name="m", backbone=str(tmp_path)))


def test_bare_weights_need_their_architecture(tmp_path):
    file = tmp_path / "weights.safetensors"
    save_file(small_model().state_dict(), file)
    with pytest.raises(BackboneError, match="say which timm architecture"):
        load_model(ModelSettings(name="m", backbone=str(file)))


def test_a_truncated_bank(tiny, bank_folder, tmp_path):
    shutil.copytree(bank_folder, tmp_path / "b")
    file = tmp_path / "b" / "plugins.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(BankError, match="truncated or corrupted"):
        load_model(tiny.model_copy(update={"bank": str(tmp_path / "b")}))
    assert Bank.load(Path(tiny.bank)).info.max_rate == MAX_RATE


@pytest.fixture
def calibrated(model_folder, bank_folder, tmp_path):
    """Settings of a copy of the model with a calibration in its folder."""

    def settings(**changes) -> ModelSettings:
        folder = shutil.copytree(model_folder, tmp_path / "calibrated", dirs_exist_ok=True)
        config = json.loads((folder / "config.json").read_text())
        config["calibration"] = {
            "bank_digest": Bank.load(bank_folder).info.digest,
            "source": 0,
            "multiplier": {"3": 0.25},
            "measure": "kl",
            "pictures": {"name": "p.tar", "count": 9},
        } | changes
        (folder / "config.json").write_text(json.dumps(config))
        return ModelSettings(name="calibrated", backbone=str(folder), bank=str(bank_folder))

    return settings


@pytest.mark.parametrize("multiplier", [0.25, {"3": 0.25}])
def test_a_calibrated_model_uses_its_multiplier(calibrated, images, multiplier):
    served = load_model(calibrated(multiplier=multiplier))
    for rate in (3, 4):
        searched = isinstance(multiplier, float) or rate == 3
        delta = compose(served.bank, 0, rate, 0.25 if searched else None)
        expected = forward(served.backbone.model, images, rate, delta)
        torch.testing.assert_close(logits(served.at(rate, True), images), expected)
        own = forward(served.backbone.model, images, rate, compose(served.bank, 0, rate))
        assert torch.allclose(expected, own, atol=1e-4) is not searched


@pytest.mark.parametrize("changes", [{"bank_digest": "0123"}, {"source": 2}])
def test_a_calibration_for_something_else_is_ignored_and_noted(calibrated, images, caplog, changes):
    with caplog.at_level("WARNING"):
        served = load_model(calibrated(**changes))
    assert "'calibrated': its calibration is ignored" in caplog.text
    assert served.calibration is None
    expected = forward(served.backbone.model, images, 3, compose(served.bank, 0, 3))
    torch.testing.assert_close(logits(served.at(3, True), images), expected)


@pytest.mark.parametrize("bank", [True, False])
def test_a_malformed_calibration_is_refused_at_load(calibrated, bank):
    settings = calibrated(multiplier=-1)
    settings = settings if bank else settings.model_copy(update={"bank": None})
    with pytest.raises(BackboneError, match=r"calibration\.multiplier must be above 0"):
        load_model(settings)


def test_a_source_in_the_settings_is_not_the_calibrated_one(calibrated):
    settings = calibrated()
    assert load_model(settings).calibration
    assert load_model(settings.model_copy(update={"source": 1})).calibration is None


def test_without_a_bank_there_is_nothing_to_calibrate(calibrated, caplog):
    served = load_model(calibrated().model_copy(update={"bank": None}))
    assert served.calibration is None
    assert not caplog.text


def test_an_evaluation_that_cannot_be_shown_is_no_reason_not_to_serve(
    model_folder, tmp_path, caplog
):
    folder = shutil.copytree(model_folder, tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"evaluation": {"rows": 3}}))
    with caplog.at_level("WARNING"):
        assert load_model(ModelSettings(name="m", backbone=str(folder))).evaluation is None
    assert "'m': its evaluation is not shown: model: Field required" in caplog.text
