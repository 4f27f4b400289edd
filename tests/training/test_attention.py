"""Recipes for models whose merged tokens do not count in attention by their size, as MAE's."""

import json
from pathlib import Path
from typing import Any

import pytest

from adapters import Bank, TaskModel, compose
from tocom import ConfigError, forward, load_backbone
from training import distill as distilling
from training.calibrate import calibrate
from training.config import DistillConfig, FinetuneConfig
from training.distill import distill
from training.evaluate import evaluate
from training.finetune import finetune
from training.measuring_config import CalibrateConfig, EvaluateConfig
from training.pictures.batches import evaluation_batches
from training.pictures.config import PicturesConfig
from training.vtab.config import VtabConfig
from training.vtab.runs import Run, _recipe
from training.vtab.tasks import VTAB

LOOP = {"batch_size": 12, "learning_rate": 3e-3, "workers": 0}


@pytest.fixture(scope="module")
def off(pictures: Path, model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bank for attention that is not proportional."""
    config = {
        "name": "off",
        "backbone": {"name": str(model_folder)},
        "pictures": [{"path": str(pictures)}],
        "max_rate": 4,
        "proportional": False,
        "unseen": 4,
        "loop": LOOP | {"steps": 2},
    }
    return distill(DistillConfig.model_validate(config), tmp_path_factory.mktemp("off") / "run")


def tune(pictures: Path, model_folder: Path, folder: Path, **changes: Any) -> Path:
    values = {
        "name": "tiny",
        "backbone": {"name": str(model_folder)},
        "pictures": {"path": str(pictures)},
        "test": {"path": str(pictures)},
        "source": 3,
        "loop": LOOP | {"epochs": 1},
    }
    return finetune(FinetuneConfig.model_validate(values | changes), folder)


def measured(model: Path | str, pictures: Path, folder: Path, **more: Any) -> dict[str, Any]:
    config = {
        "backbone": {"name": str(model)},
        "pictures": {"path": str(pictures)},
        "targets": [2],
        "workers": 0,
    }
    path = evaluate(EvaluateConfig.model_validate(config | more), folder)
    result: dict[str, Any] = json.loads(path.read_text())
    return result


def test_a_bank_says_for_which_attention_it_was_distilled(off: Path) -> None:
    assert Bank.load(off).info.proportional is False
    recipe = Bank.load(off).info.training["recipe"]
    assert isinstance(recipe, dict)
    assert recipe["proportional"] is False
    watched = Bank.load(off).info.training["last"]
    assert isinstance(watched, dict)
    assert watched["unseen_kl_4_plain"]


def test_what_is_distilled_runs_so(
    pictures: Path, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: set[bool] = set()
    real = distilling.outputs

    def note(model: Any, tokens: Any, variant: Any, *rest: Any) -> Any:
        seen.add(variant.proportional or not variant.rate)
        return real(model, tokens, variant, *rest)

    monkeypatch.setattr(distilling, "outputs", note)
    config = {
        "name": "off",
        "backbone": {"name": str(model_folder)},
        "pictures": [{"path": str(pictures)}],
        "max_rate": 1,
        "proportional": False,
        "to_zero": 1.0,
        "loop": LOOP | {"steps": 1},
    }
    distill(DistillConfig.model_validate(config), tmp_path / "run")
    assert seen == {False, True}  # rate 0 is the same either way


@pytest.mark.parametrize("method", ["full", "linear"])
def test_what_is_tuned_says_it_and_is_measured_with_it(
    pictures: Path, model_folder: Path, tmp_path: Path, method: str
) -> None:
    folder = tune(pictures, model_folder, tmp_path / "run", method=method, proportional=False)
    stock = load_backbone(str(model_folder))
    tuned = load_backbone(str(folder)) if method == "full" else TaskModel.load(folder).on(stock)
    assert (tuned.source, tuned.proportional) == (3, False)
    full = method == "full"
    given = {"backbone": {"name": str(folder if full else model_folder)}}
    given |= {} if full else {"task": str(folder)}
    result = measured("", pictures, tmp_path / "out", **given)
    assert result["proportional"] is False
    ((images, _),) = evaluation_batches(tuned, [PicturesConfig(path=str(pictures))])
    adapter = tuned.adapter
    own, at = (
        forward(tuned.model, images, rate, adapter=adapter, proportional=False).log_softmax(-1)
        for rate in (3, 2)
    )
    kl = (own.exp() * (own - at)).sum(-1).mean().item()
    assert result["rows"][0]["plain"]["kl"] == pytest.approx(kl, abs=2e-5)
    with pytest.raises(ConfigError, match="tuned at rate 3 with proportional=False, not with True"):
        measured("", pictures, tmp_path / "other", proportional=True, **given)


def test_what_is_proportional_says_nothing(
    pictures: Path, model_folder: Path, tmp_path: Path
) -> None:
    folder = tune(pictures, model_folder, tmp_path / "run")
    assert "proportional" not in json.loads((folder / "config.json").read_text())
    assert "proportional" not in json.loads((tmp_path / "run" / "config.json").read_text())
    assert "proportional" not in measured(folder, pictures, tmp_path / "out")


def test_a_bank_decides_and_the_other_is_refused(
    pictures: Path, model_folder: Path, off: Path, tmp_path: Path
) -> None:
    result = measured(model_folder, pictures, tmp_path / "out", bank=str(off))
    backbone, bank = load_backbone(str(model_folder)), Bank.load(off)
    ((images, _),) = evaluation_batches(backbone, [PicturesConfig(path=str(pictures))])
    own = forward(backbone.model, images).log_softmax(-1)
    at = forward(backbone.model, images, 2, compose(bank, 0, 2), proportional=False)
    kl = (own.exp() * (own - at.log_softmax(-1))).sum(-1).mean().item()
    assert result["rows"][0]["bank"]["kl"] == pytest.approx(kl, abs=2e-5)
    with pytest.raises(ConfigError, match="bank 'off' is for proportional=False, not for True"):
        measured(model_folder, pictures, tmp_path / "b", bank=str(off), proportional=True)


def test_a_calibration_is_with_the_attention_of_the_bank(
    pictures: Path, model_folder: Path, off: Path, tmp_path: Path
) -> None:
    config = {
        "backbone": {"name": str(model_folder)},
        "bank": str(off),
        "pictures": {"path": str(pictures)},
        "multipliers": [0.2],
        "targets": [2],
        "workers": 0,
    }
    path = calibrate(CalibrateConfig.model_validate(config), tmp_path / "out")
    tried = {row["multiplier"]: row["kl"] for row in json.loads(path.read_text())["tried"]}
    rows = measured(model_folder, pictures, tmp_path / "m", bank=str(off))["rows"]
    assert tried[0.1] == pytest.approx(rows[0]["bank"]["kl"], abs=2e-6)


def test_runs_of_vtab_are_tuned_so() -> None:
    said = {"root": "data", "proportional": False}
    assert not _recipe(VtabConfig.model_validate(said), Run(VTAB[0], 2, 0)).proportional
    assert _recipe(VtabConfig.model_validate({"root": "data"}), Run(VTAB[0], 2, 0)).proportional
