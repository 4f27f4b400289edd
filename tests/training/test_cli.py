from pathlib import Path

import pytest

from training.cli import main


def test_distill_then_evaluate(
    pictures: Path, model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = [f"backbone.name={model_folder}"]
    made = main(
        ["distill", "deit-tiny-small-data", *common, f"pictures=[{{path='{pictures}'}}]",
         "max_rate=4", "unseen=2", "loop.steps=2", "loop.batch_size=4", "loop.workers=0",
         "--run", str(tmp_path / "run")]
    )  # fmt: skip
    assert made == 0
    bank = capsys.readouterr().out.strip()
    assert bank == str(tmp_path / "run" / "bank")
    measured = main(
        ["evaluate", "every-rate", *common, f"bank={bank}", f"pictures.path={pictures}",
         "targets=[0, 4]", "--run", str(tmp_path / "measured")]
    )  # fmt: skip
    assert measured == 0
    assert (tmp_path / "measured" / "evaluation.json").exists()


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
