"""The folders that measurements are done in."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tocom import ConfigError, load_backbone
from training.measuring import claim
from training.measuring_config import EvaluateConfig
from training.program.dry_run import dry_run


@pytest.fixture
def asked(pictures: Path, model_folder: Path) -> EvaluateConfig:
    said = {"backbone": {"name": str(model_folder)}, "pictures": str(pictures), "targets": [1]}
    return EvaluateConfig.model_validate(said)


Claim = Callable[[EvaluateConfig], bool]


@pytest.fixture
def claimed(asked: EvaluateConfig, model_folder: Path, tmp_path: Path) -> Claim:
    """Claim a folder that was claimed before, and begun."""
    backbone = load_backbone(str(model_folder))

    def claimed(config: EvaluateConfig) -> bool:
        return claim(tmp_path / "run", "evaluation.json", config, backbone, None)

    assert not claimed(asked)
    (tmp_path / "run" / "progress.json").touch()
    return claimed


def test_what_changes_no_figure_may_be_another(asked: EvaluateConfig, claimed: Claim) -> None:
    assert not claimed(asked.model_copy(update={"workers": 3}))
    with pytest.raises(ConfigError, match="another recipe: batch_size 50 there, 7 here"):
        claimed(asked.model_copy(update={"batch_size": 7}))


def test_a_folder_of_an_older_version_says_less(
    asked: EvaluateConfig, claimed: Claim, tmp_path: Path
) -> None:
    path = tmp_path / "run" / "config.json"
    said = json.loads(path.read_text())
    for key in ("task_digest", "multipliers", "others"):
        del said[key]
    del said["recipe"]["labelled"]
    path.write_text(json.dumps(said))
    assert not claimed(asked)
    with pytest.raises(ConfigError, match="another recipe: labelled true there, false here"):
        claimed(asked.model_copy(update={"labelled": False}))


def test_a_folder_that_does_not_say_what_it_holds_is_refused(
    asked: EvaluateConfig, claimed: Claim, tmp_path: Path
) -> None:
    (tmp_path / "run" / "config.json").write_text('{"recipe": ')
    for run in (claimed, lambda config: dry_run(config, tmp_path / "run")):
        with pytest.raises(ConfigError, match=r"config\.json does not say which run the folder"):
            run(asked)


def test_a_dry_run_takes_a_folder_that_the_run_would_take(
    asked: EvaluateConfig, claimed: Claim, tmp_path: Path
) -> None:
    others = asked.model_copy(update={"workers": 0})
    assert dry_run(others, tmp_path / "run").endswith("run, gone on with")
    (tmp_path / "run" / "progress.json").unlink()  # nothing has begun
    other = asked.model_copy(update={"targets": (2,)})
    assert dry_run(other, tmp_path / "run").endswith("run, new")
    assert not claimed(other)
