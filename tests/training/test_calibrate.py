import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from adapters import Bank, compose
from tests.training.banks import random_bank
from tocom import ConfigError, RateError, forward, load_backbone
from training import calibrate as module
from training import measuring
from training.calibrate import Tried, calibrate, table
from training.measuring_config import CalibrateConfig
from training.pictures.batches import evaluation_batches
from training.presets import read_recipe

OWN = 0.1


@pytest.fixture(scope="module")
def bank(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    bank = random_bank(load_backbone(str(model_folder)), OWN)
    return bank.save(tmp_path_factory.mktemp("banks") / "bank")


@pytest.fixture
def config(pictures: Path, model_folder: Path, bank: Path) -> CalibrateConfig:
    return CalibrateConfig.model_validate(
        {
            "backbone": {"name": str(model_folder)},
            "bank": str(bank),
            "pictures": {"path": str(pictures)},
            "multipliers": [0.02, 0.5],
            "targets": [2, 4],
            "batch_size": 7,
            "workers": 0,
        }
    )


def changed(config: CalibrateConfig, **changes: Any) -> CalibrateConfig:
    return CalibrateConfig.model_validate(config.model_dump() | changes)


def read(path: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(path.read_text())
    return result


def values(result: dict[str, Any]) -> dict[tuple[Any, float], float]:
    return {(row["target"], row["multiplier"]): row[result["measure"]] for row in result["tried"]}


def test_figures_are_those_of_single_forwards(config: CalibrateConfig, tmp_path: Path) -> None:
    backbone, bank = load_backbone(config.backbone.name), Bank.load(config.bank)
    result = read(calibrate(config, tmp_path))
    ((images, _),) = evaluation_batches(backbone, [config.pictures])
    expected = forward(backbone.model, images).log_softmax(-1)

    def kl(target: int, scale: float) -> torch.Tensor:
        delta = compose(bank, 0, target, scale)
        answer = forward(backbone.model, images, target, delta).log_softmax(-1)
        return (expected.exp() * (expected - answer)).sum(-1)

    found = values(result)
    for scale in (0.02, OWN, 0.5):
        for target in (2, 4):
            assert found[target, scale] == pytest.approx(kl(target, scale).mean().item(), abs=2e-5)
        mean = (found[2, scale] + found[4, scale]) / 2
        assert found["all", scale] == pytest.approx(mean, abs=1e-6)
    row = next(r for r in result["tried"] if (r["target"], r["multiplier"]) == (4, 0.5))
    gain = kl(4, OWN) - kl(4, 0.5)
    assert row["gain"] == pytest.approx(gain.mean().item(), abs=2e-5)
    assert row["gain_se"] == pytest.approx(gain.std().item() / 24**0.5, rel=1e-3)
    assert result["multiplier"] == min((0.02, OWN, 0.5), key=lambda s: found["all", s])
    assert result["weights_digest"] == backbone.digest
    assert result["bank"] == {"name": "random", "digest": bank.info.digest, "scale": OWN}
    assert (result["source"], result["pictures"]["count"]) == (0, 24)


def test_top1_is_the_best_of_labelled_pictures(config: CalibrateConfig, tmp_path: Path) -> None:
    result = read(calibrate(changed(config, measure="top1", multipliers=[0.5, 3]), tmp_path))
    found = values(result)
    assert found["all", result["multiplier"]] == max(found["all", s] for s in (OWN, 0.5, 3))
    backbone, bank = load_backbone(config.backbone.name), Bank.load(config.bank)
    ((images, labels),) = evaluation_batches(backbone, [config.pictures])
    answer = forward(backbone.model, images, 4, compose(bank, 0, 4, 3.0)).argmax(-1)
    assert found[4, 3] == pytest.approx(100 * (answer == labels).float().mean().item(), abs=1e-4)


def test_a_multiplier_for_each_target(config: CalibrateConfig, tmp_path: Path) -> None:
    result = read(calibrate(changed(config, per_target=True), tmp_path))
    found = values(result)
    assert result["multiplier"] == {
        str(target): min((0.02, OWN, 0.5), key=lambda s, t=target: found[t, s]) for target in (2, 4)
    }


@pytest.mark.parametrize("per_target", [True, False])
def test_a_continuous_search_comes_closer(
    config: CalibrateConfig, tmp_path: Path, per_target: bool
) -> None:
    """With KL in place of a parabola, the search ends at its lowest point."""
    lowest = {2: 0.13, 4: 0.17}

    def parabola(self: Any, tokens: Any, stock: Any, classes: Any, target: int, s: float) -> Any:
        return torch.full((len(tokens),), (s - lowest[target]) ** 2, dtype=torch.float64)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module.Search, "_loss", parabola)
        result = read(calibrate(changed(config, continuous=True, per_target=per_target), tmp_path))
    expected: Any = {"2": 0.13, "4": 0.17} if per_target else 0.15
    assert result["multiplier"] == pytest.approx(expected)


def test_a_continuous_search_is_never_worse(config: CalibrateConfig, tmp_path: Path) -> None:
    grid = read(calibrate(config, tmp_path / "grid"))
    fine = read(calibrate(changed(config, continuous=True), tmp_path / "fine"))
    assert values(fine)["all", fine["multiplier"]] <= values(grid)["all", grid["multiplier"]]


def tried(**losses: float) -> dict[float, Tried]:
    return {float(s[1:]): Tried(float(s[1:]), loss, 0, None) for s, loss in losses.items()}


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ({"_1": 4, "_2": 1, "_4": 1}, 3),  # (s - 3)²
        ({"_1": 0, "_2": 1, "_4": 9}, None),  # the best is the least tried
        ({"_1": 9, "_2": 1, "_4": 0}, None),
        ({"_1": 1, "_2": 1, "_4": 1}, None),
        ({"_1": 1, "_2": 0, "_3": 1}, None),  # tried already
        ({"_1": 1}, None),
    ],
)
def test_the_lowest_point_of_a_parabola(losses: dict[str, float], expected: float | None) -> None:
    assert module._lowest(tried(**losses)) == expected


def test_the_table_and_the_sentence(config: CalibrateConfig, tmp_path: Path) -> None:
    result = read(calibrate(config, tmp_path))
    text = (tmp_path / "calibration.md").read_text()
    assert text == table(result)
    assert "| multiplier | 2 | 4 | all |" in text
    assert re.search(r"^\| 0\.1 \| .*\d\.\d{4}", text, re.MULTILINE)
    assert text.count("**") == 2 * 3  # the best of each column
    assert text.endswith(result["summary"] + "\n")


def test_no_gain_is_said(config: CalibrateConfig, tmp_path: Path) -> None:
    result = read(calibrate(changed(config, multipliers=[OWN]), tmp_path))
    assert result["summary"] == "No gain: the bank's own multiplier 0.1 is the best of 1 tried."
    assert result["multiplier"] == OWN


@pytest.mark.parametrize(("noise", "words"), [(0.0, "more than twice"), (10.0, "less than twice")])
def test_a_gain_is_said_with_its_certainty(
    config: CalibrateConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    noise: float, words: str,
) -> None:  # fmt: skip
    def loss(self: Any, tokens: Any, stock: Any, classes: Any, target: int, s: float) -> Any:
        spread = torch.linspace(-1, 1, len(tokens), dtype=torch.float64)
        return 1 + abs(s - 0.5) + noise * s * spread

    monkeypatch.setattr(module.Search, "_loss", loss)
    said = read(calibrate(config, tmp_path))["summary"]
    assert said.startswith(
        "Multiplier 0.5 instead of the bank's own 0.1: KL divergence (nats) 1.0000 instead of "
        "1.4000, mean of 2 rates."
    )
    assert f"The gain is {words} its standard error." in said
    assert said.endswith("The best is the least or the most tried: others beyond it may be better.")


def test_limit_spreads_pictures_evenly(config: CalibrateConfig, tmp_path: Path) -> None:
    backbone = load_backbone(config.backbone.name)
    measurement = measuring.Measurement(backbone, config.pictures, 7, 0, False, limit=5)
    assert measurement.keys == [(0, 0), (0, 4), (0, 9), (0, 14), (0, 19)]
    assert read(calibrate(changed(config, limit=5), tmp_path))["pictures"]["count"] == 5


@pytest.mark.parametrize("killed_after", [2, 5])
def test_a_killed_search_goes_on_to_the_same_figures(
    config: CalibrateConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed_after: int
) -> None:
    config = changed(config, continuous=True)
    kl = module.Search._loss
    # A random bank repairs nothing: give it a best multiplier, to be searched in a second pass.
    monkeypatch.setattr(
        module.Search, "_loss", lambda *given: kl(*given) + 100 * (given[-1] - 0.15) ** 2
    )
    whole = calibrate(config, tmp_path / "whole").read_text()
    assert (tmp_path / "whole" / "progress-1.json").exists()
    write, writes = measuring.replace_file, []

    def die(path: Path, text: str) -> None:
        write(path, text)
        writes.append(path)
        if len(writes) == 1 + killed_after:  # the first one is config.json
            raise SystemExit("killed")

    with monkeypatch.context() as patch:
        patch.setattr(measuring, "replace_file", die)
        with pytest.raises(SystemExit, match="killed"):
            calibrate(config, tmp_path / "killed")
    assert calibrate(config, tmp_path / "killed").read_text() == whole


def test_a_finished_search_is_returned_and_another_one_refused(
    config: CalibrateConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = calibrate(config, tmp_path)
    monkeypatch.setattr(module, "Search", lambda *_: pytest.fail("searched again"))
    assert calibrate(config, tmp_path) == path
    with pytest.raises(ConfigError, match=r"another recipe: multipliers \[.*\] there, \[.*\] here"):
        calibrate(changed(config, multipliers=[0.3]), tmp_path)


def test_the_bank_is_not_changed(config: CalibrateConfig, bank: Path, tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in bank.iterdir()}
    calibrate(config, tmp_path)
    assert {path: path.read_bytes() for path in bank.iterdir()} == before


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"targets": [0, 2]}, ConfigError, "targets must not hold the source rate 0"),
        ({"targets": [5]}, RateError, r"target rate must be in 0\.\.4, got 5"),
        ({"source": 9, "targets": [1]}, RateError, r"source rate must be in 0\.\.4, got 9"),
    ],
)
def test_mistakes_are_named_before_anything_is_written(
    config: CalibrateConfig, tmp_path: Path, changes: dict[str, Any], error: type, message: str
) -> None:
    with pytest.raises(error, match=message):
        calibrate(changed(config, **changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("multipliers=[0.1, 0]", r"multipliers\.1 must be more than 0\.0, got 0"),
        ("multipliers=[inf]", r"multipliers\.0 must be a number, got inf"),
        ("multipliers=[]", "multipliers must have at least 1 of them"),
        ("targets=[-1]", r"targets\.0 must be at least 0, got -1"),
        ("limit=0", "limit must be more than 0, got 0"),
        ("measure=loss", "measure must be 'kl' or 'top1', got 'loss'"),
    ],
)
def test_recipes_that_are_not_allowed(override: str, message: str) -> None:
    given = ["backbone.name=a", "bank=b", "pictures.path=c", override]
    with pytest.raises(ConfigError, match=message):
        read_recipe(CalibrateConfig, "multiplier", given)


def test_a_continuous_search_needs_a_smooth_measure() -> None:
    given = ["backbone.name=a", "bank=b", "pictures.path=c", "continuous=true", "measure=top1"]
    with pytest.raises(ConfigError, match="needs a smooth measure: kl, not top1"):
        read_recipe(CalibrateConfig, "multiplier", given)
