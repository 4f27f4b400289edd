import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from adapters import Bank, Calibration, Store
from tests.training.banks import random_bank
from tocom import ConfigError, load_backbone
from training.attach import attach
from training.calibrate import calibrate
from training.evaluate import evaluate
from training.measuring_config import CalibrateConfig, EvaluateConfig


@pytest.fixture
def model(model_folder: Path, tmp_path: Path) -> Path:
    """A model folder to write into."""
    return Path(shutil.copytree(model_folder, tmp_path / "model"))


@pytest.fixture
def bank(model_folder: Path, tmp_path: Path) -> Path:
    return random_bank(load_backbone(str(model_folder))).save(tmp_path / "bank")


def evaluation(bank: Path | None, model_folder: Path, **changes: Any) -> dict[str, Any]:
    """What evaluate writes, in short."""
    row = {"source": 0, "target": 1, "gmacs": 1.0, "tokens": 5, "pictures": 3}
    digest = Bank.load(bank).info.digest if bank else None
    return {
        "model": "tiny",
        "weights_digest": load_backbone(str(model_folder)).digest,
        "bank": bank and {"name": "random", "digest": digest},
        "pictures": {"name": "p.tar", "count": 3},
        "rows": [row | {"plain": {"agreement": 99.0, "kl": 0.1}}],
    } | changes


def write(path: Path, said: object) -> Path:
    path.write_text(json.dumps(said))
    return path


def read(path: Path) -> dict[str, Any]:
    said: dict[str, Any] = json.loads(path.read_text())
    return said


def test_what_the_programs_write_can_be_attached(
    pictures: Path, model: Path, bank: Path, tmp_path: Path
) -> None:
    common = {
        "backbone": {"name": str(model)}, "bank": str(bank), "pictures": {"path": str(pictures)},
        "targets": [2], "workers": 0,
    }  # fmt: skip
    search = calibrate(
        CalibrateConfig.model_validate(common | {"per_target": True, "multipliers": [0.3]}),
        tmp_path / "search",
    )
    before = read(model / "config.json")
    assert attach(search, model) == model / "config.json"
    backbone = load_backbone(str(model))
    calibration = Calibration.of(backbone)
    assert calibration is not None
    assert calibration.fits(Bank.load(bank).info.digest, 0)
    multiplier = read(search)["multiplier"]["2"]
    assert calibration.scale(2) == multiplier
    assert calibration.pictures == {"name": "pictures.tar", "count": 24}

    measured = evaluate(EvaluateConfig.model_validate(common), tmp_path / "measured")
    assert read(measured)["rows"][0]["multiplier"] == multiplier  # as it will be served
    attach(measured, model)
    assert load_backbone(str(model)).evaluation == read(measured)
    attach(measured, bank)
    assert Bank.load(bank).info.evaluation["results"] == [read(measured)]
    assert before.items() <= read(model / "config.json").items()


def test_an_evaluation_is_made_anew_once_a_calibration_is_attached(
    pictures: Path, model: Path, bank: Path, tmp_path: Path
) -> None:
    config = EvaluateConfig.model_validate(
        {
            "backbone": {"name": str(model)}, "bank": str(bank),
            "pictures": {"path": str(pictures)}, "targets": [2], "workers": 0,
        }
    )  # fmt: skip
    evaluate(config, tmp_path / "run")
    said = evaluation(bank, model) | {"source": 0, "measure": "kl", "multiplier": 0.5}
    attach(write(tmp_path / "c.json", said), model)
    with pytest.raises(ConfigError, match=r"another calibration .*multipliers {}, now {'0→2': 0.5"):
        evaluate(config, tmp_path / "run")


def test_the_banks_digest_and_tensors_stay(bank: Path, model: Path, tmp_path: Path) -> None:
    before = Bank.load(bank).info
    tensors = (bank / "plugins.safetensors").read_bytes()
    attach(write(tmp_path / "e.json", evaluation(bank, model)), bank)
    after = Bank.load(bank).info
    assert after.digest == before.digest
    assert after.model_copy(update={"evaluation": before.evaluation}) == before
    assert (bank / "plugins.safetensors").read_bytes() == tensors
    assert sorted(path.name for path in bank.iterdir()) == ["bank.json", "plugins.safetensors"]


def test_evaluations_of_a_bank_gather_the_newest_of_each_model_and_pictures(
    bank: Path, model: Path, tmp_path: Path
) -> None:
    for model_name, pictures, count in (("a", "p", 1), ("b", "p", 2), ("a", "q", 3), ("a", "p", 4)):
        said = evaluation(
            bank, model, model=model_name, pictures={"name": pictures, "count": count}
        )
        attach(write(tmp_path / "e.json", said), bank)
    results: Any = Bank.load(bank).info.evaluation["results"]
    assert [result["pictures"]["count"] for result in results] == [2, 3, 4]


def test_results_of_another_model_or_bank_are_refused(
    bank: Path, model: Path, tmp_path: Path
) -> None:
    def refused(said: dict[str, Any], folder: Path, message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            attach(write(tmp_path / "r.json", said), folder)

    forged = "0123" * 16
    said = evaluation(bank, model)
    own, banks = said["weights_digest"][:12], said["bank"]["digest"][:12]
    other_model = rf"a model with the weights 012301230123, .* has the weights {own}"
    refused(said | {"weights_digest": forged}, model, other_model)
    old = {key: value for key, value in said.items() if key != "weights_digest"}
    refused(old, model, "does not say which weights it is of; measure again")
    other_bank = said | {"bank": {"name": "random", "digest": forged}}
    refused(other_bank, bank, rf"of the bank 012301230123, .* holds the bank {banks}")
    refused(said | {"bank": None}, bank, "is of no bank")
    calibration = said | {"source": 0, "measure": "kl", "multiplier": 0.1}
    refused(calibration, bank, "a calibration, which belongs into the folder of its model")
    refused(calibration | {"weights_digest": forged}, model, other_model)
    assert "evaluation" not in read(model / "config.json")
    assert Bank.load(bank).info.evaluation == {}


def test_what_is_published_or_cached_is_not_touched(
    bank: Path, model: Path, tmp_path: Path
) -> None:
    result = write(tmp_path / "e.json", evaluation(bank, model))
    store = Store(tmp_path / "store")
    version = store.find(store.publish(bank))
    with pytest.raises(ConfigError, match="a version in a store, which never changes"):
        attach(result, version.folder)
    cached = tmp_path / "cached"
    cached.mkdir()
    for file in bank.iterdir():
        (cached / file.name).symlink_to(file)
    with pytest.raises(ConfigError, match="is a link, as in the hub's cache"):
        attach(result, cached)
    assert store.verify() == {}
    assert store.get("random").info.evaluation == {}


@pytest.mark.parametrize("content", ["", "[1]", "{}", '{"rows": []}', '{"multiplier": 1}'])
def test_files_that_are_no_results(content: str, model: Path, tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    path.write_text(content)
    with pytest.raises(
        ConfigError, match=r"r\.json (cannot be read|is neither an evaluation\.json)"
    ):
        attach(path, model)


def test_folders_that_are_neither(bank: Path, model: Path, tmp_path: Path) -> None:
    result = write(tmp_path / "e.json", evaluation(bank, model))
    with pytest.raises(ConfigError, match="neither a model folder .* nor a bank folder"):
        attach(result, tmp_path)
    with pytest.raises(ConfigError, match=r"nix\.json cannot be read"):
        attach(tmp_path / "nix.json", model)


def test_results_of_several_tasks_stand_side_by_side(
    bank: Path, model: Path, tmp_path: Path
) -> None:
    said = [evaluation(bank, model, task_digest=digest * 64) for digest in "ab"]
    for each in (*said, said[0]):
        attach(write(tmp_path / "e.json", each), bank)
    assert Bank.load(bank).info.evaluation["results"] == [said[1], said[0]]


def test_a_result_of_a_task_is_none_of_its_backbone(
    bank: Path, model: Path, tmp_path: Path
) -> None:
    result = write(tmp_path / "e.json", evaluation(bank, model, task_digest="a" * 64))
    with pytest.raises(ConfigError, match="is of the task aaaaaaaaaaaa, which .*, a model folder"):
        attach(result, model)
