import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from adapters import Bank, compose
from adapters.cascade import margins, read_cascade
from tests.training.banks import random_bank
from tocom import ConfigError, cost, forward, load_backbone
from training.attach import attach
from training.cascade.calibrate import calibrate_cascade
from training.cascade.chains import at_least
from training.cascade.config import CascadeConfig
from training.pictures.batches import evaluation_batches


@pytest.fixture(scope="module")
def bank(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    bank = random_bank(load_backbone(str(model_folder)))
    return bank.save(tmp_path_factory.mktemp("banks") / "bank")


@pytest.fixture
def config(pictures: Path, model_folder: Path, bank: Path) -> CascadeConfig:
    return CascadeConfig.model_validate(
        {
            "backbone": {"name": str(model_folder)},
            "bank": str(bank),
            "pictures": [str(pictures)],
            "rates": [4, 2, 0],
            "agreements": [0.5, 0.9],
            "batch_size": 7,
            "workers": 0,
        }
    )


def changed(config: CascadeConfig, **changes: Any) -> CascadeConfig:
    return CascadeConfig.model_validate(config.model_dump() | changes)


def test_points_are_what_single_forwards_come_to(config: CascadeConfig, tmp_path: Path) -> None:
    backbone, bank = load_backbone(config.backbone.name), Bank.load(str(config.bank))
    found = read_cascade(calibrate_cascade(config, tmp_path))
    ((images, _),) = evaluation_batches(backbone, config.pictures)
    logits = {
        rate: forward(backbone.model, images, rate, compose(bank, 0, rate) if rate else None)
        for rate in (4, 2, 0)
    }
    macs = {rate: cost(backbone.model, rate).macs for rate in logits}
    expected = logits[0].argmax(-1)
    assert found.points[-1].agreement == 1
    for point in found.points:
        agreed, spent = 0, 0
        for i in range(len(images)):
            for rate, threshold in zip(point.rates, (*point.thresholds, 0), strict=True):
                spent += macs[rate]
                if margins(logits[rate][i]) >= threshold:
                    agreed += int(logits[rate][i].argmax() == expected[i])
                    break
        # The margin that a threshold is made of may round to its other side.
        bound = at_least(torch.tensor(agreed / len(images)), len(images)).item()
        assert point.agreement == pytest.approx(
            1.0 if point.rates == (0,) else bound, abs=1.5 / len(images)
        )
        assert point.share == pytest.approx(spent / len(images) / macs[0], abs=1.1 / len(images))
    assert found.weights_digest == backbone.digest
    assert found.bank_digest == bank.info.digest
    assert found.misfit(backbone.digest, "", bank.info.digest, bank.ladder, 0) is None
    assert found.pictures == {"names": ["pictures.tar"], "count": 24}
    assert "| 100.00 | 1.000 |" in (tmp_path / "cascade.md").read_text()


def test_a_finished_folder_is_left_as_it_is(config: CascadeConfig, tmp_path: Path) -> None:
    path = calibrate_cascade(config, tmp_path)
    before = path.stat().st_mtime_ns
    assert calibrate_cascade(config, tmp_path).stat().st_mtime_ns == before
    with pytest.raises(ConfigError, match="limit"):
        calibrate_cascade(changed(config, limit=5), tmp_path)


def test_rates_of_a_bank_are_the_default(config: CascadeConfig, tmp_path: Path) -> None:
    rates = calibrate_cascade(changed(config, rates=(), limit=3), tmp_path)
    assert {rate for point in read_cascade(rates).points for rate in point.rates} <= {4, 3, 2, 1, 0}


def test_a_ladder_without_an_end_needs_rates(config: CascadeConfig, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not say its highest rate: name the rates"):
        calibrate_cascade(changed(config, rates=(), bank=None), tmp_path)


@pytest.mark.parametrize("rates", [[4, 2], [0]])
def test_rates_without_a_comparison_are_refused(config: CascadeConfig, rates: list[int]) -> None:
    with pytest.raises(ValueError, match="a cascade needs rate 0"):
        changed(config, rates=rates)


def test_a_cascade_goes_into_the_folder_of_its_model(
    config: CascadeConfig, model_folder: Path, bank: Path, tmp_path: Path
) -> None:
    path = calibrate_cascade(changed(config, limit=3), tmp_path / "run")
    model = Path(shutil.copytree(model_folder, tmp_path / "model"))
    assert read_cascade(attach(path, model)) == read_cascade(path)
    with pytest.raises(ConfigError, match="belongs into a model folder .* is neither"):
        attach(path, bank)
    other = json.loads(path.read_text()) | {"weights_digest": "f" * 64}
    (tmp_path / "other.json").write_text(json.dumps(other))
    with pytest.raises(ConfigError, match="is of another model than the one in"):
        attach(tmp_path / "other.json", model)


def test_a_model_of_several_classes_is_refused(
    config: CascadeConfig, model_folder: Path, tmp_path: Path
) -> None:
    model = Path(shutil.copytree(model_folder, tmp_path / "model"))
    said = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(said | {"multi_label": True}))
    many = changed(config, backbone={"name": str(model)})
    with pytest.raises(ConfigError, match="tells several classes of a picture"):
        calibrate_cascade(many, tmp_path / "run")
