import json
import shutil
from pathlib import Path

import pytest

from tests.training.banks import random_bank
from tocom import load_backbone
from training.cli import main


def test_distill_then_evaluate(
    pictures: Path, model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = [f"backbone.name={model_folder}"]
    made = main(
        ["distill", "deit-tiny-small-data", *common, f"pictures=[{{path='{pictures}'}}]",
         "max_rate=4", "unseen=2", "loop.steps=2", "loop.batch_size=4", "loop.workers=0",
         "--folder", str(tmp_path / "run")]
    )  # fmt: skip
    assert made == 0
    bank = capsys.readouterr().out.strip()
    assert bank == str(tmp_path / "run" / "bank")
    measured = main(
        ["evaluate", "every-rate", *common, f"bank={bank}", f"pictures.path={pictures}",
         "targets=[0, 4]", "--folder", str(tmp_path / "measured")]
    )  # fmt: skip
    assert measured == 0
    assert (tmp_path / "measured" / "evaluation.json").exists()


def test_calibrate_then_attach(
    pictures: Path, model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bank = random_bank(load_backbone(str(model_folder))).save(tmp_path / "bank")
    model = shutil.copytree(model_folder, tmp_path / "model")
    found = main(
        ["calibrate", "multiplier", f"backbone.name={model}", f"bank={bank}",
         f"pictures.path={pictures}", "targets=[2]", "multipliers=[0.2]",
         "--folder", str(tmp_path / "search")]
    )  # fmt: skip
    assert found == 0
    said = capsys.readouterr()
    assert said.out == f"{tmp_path / 'search' / 'calibration.json'}\n"
    assert json.loads(Path(said.out.strip()).read_text())["summary"] in said.err
    assert main(["attach", said.out.strip(), str(model)]) == 0
    assert capsys.readouterr().out == f"{model / 'config.json'}\n"
    assert main(["attach", said.out.strip(), str(bank)]) == 2
    assert "belongs into the folder of its model" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["evaluate every-rate", "calibrate multiplier", "vtab vtab1k"])
def test_what_measures_is_one_process(
    pictures: Path, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str], command: str,
) -> None:  # fmt: skip
    monkeypatch.setenv("WORLD_SIZE", "2")  # torchrun and accelerate launch do
    common = [f"backbone.name={model_folder}", f"pictures.path={pictures}", "bank=nowhere"]
    given = [f"root={tmp_path}"] if command.startswith("vtab") else common
    assert main([*command.split(), *given, "--folder", str(tmp_path / "run")]) == 2
    name = command.split(maxsplit=1)[0]
    assert f"{name} runs in one process, got 2 of torchrun" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["distill", "nope"], "no recipe file 'nope'"),
        (["distill", "deit-tiny-small-data"], "pictures: Field required"),
        (
            [
                "distill",
                "deit-tiny-small-data",
                "backbone.name=FOLDER",
                "pictures=[{path='nowhere'}]",
            ],
            "there are no pictures at nowhere",
        ),
        (["finetune", "deit-tiny-task", "pictures.path=a"], "test: Field required"),
    ],
)
def test_mistakes_are_one_message_and_exit_2(
    arguments: list[str], message: str, model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([argument.replace("FOLDER", str(model_folder)) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("tocom-train: ")
    assert message in error


def test_overrides_may_follow_options(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    arguments = [
        "distill",
        "deit-tiny-small-data",
        "rank=0",
        "--folder",
        str(tmp_path),
        "unseen=-1",
    ]
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert "rank" in said
    assert "unseen" in said


@pytest.mark.parametrize(
    ("arguments", "unknown"),
    [(["distill", "x", "--rank", "1"], "--rank 1"), (["attach", "a", "b", "c"], "c")],
)
def test_unknown_arguments_are_named(
    arguments: list[str], unknown: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(arguments)
    assert f"unknown arguments: {unknown}" in capsys.readouterr().err
