import json
import re
import shutil
from pathlib import Path

import pytest

from tests.training.banks import random_bank
from tocom import load_backbone
from training.cli import COMMANDS, main
from training.pictures.config import PicturesConfig
from training.pictures.sets import open_pictures
from training.presets import command_of, find_recipe, presets
from training.program.kinds import KINDS


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
    said = capsys.readouterr()
    bank = said.out.strip()
    assert bank == str(tmp_path / "run" / "bank")
    assert said.err.index("\npictures  22 distinct, ") < said.err.index("measuring what each pair")
    assert "| unseen KL at rate | plain" in said.err
    assert f"\n  tocom-bank publish {bank}\n" in said.err
    assert f"={model_folder},bank={bank}\n" in said.err
    evaluation = f"evaluate every-rate backbone.name={model_folder} bank={bank} pictures="
    assert f"\n  tocom-train {evaluation}OTHER_PICTURES\n" in said.err
    measured = main(
        ["evaluate", "every-rate", *common, f"bank={bank}", f"pictures.path={pictures}",
         "targets=[0, 4]", "--folder", str(tmp_path / "measured")]
    )  # fmt: skip
    assert measured == 0
    said = capsys.readouterr()
    assert said.out == f"{tmp_path / 'measured' / 'evaluation.json'}\n"
    assert "| source | rate | GMACs |" in said.err


def test_the_other_commands_of_training_end_with_what_to_type_next(
    pictures: Path, model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = [f"backbone.name={model_folder}", f"pictures={pictures}", "loop.workers=0"]
    short = ["loop.batch_size=4", "--folder", str(tmp_path / "run with space")]
    tuned = ["finetune", "deit-tiny-task", "--method", "linear", "loop.epochs=0.2", *common]
    assert main([*tuned, f"test={pictures}", "name=mine", *short]) == 0
    said = capsys.readouterr()
    task = tmp_path / "run with space" / "task"
    assert said.out == f"{task}\n"
    assert re.search(r"of the test pictures \d+\.\d\d % are answered rightly", said.err)
    assert f"tocom-serve --model 'mine={model_folder},task={task},bank=BANK'\n" in said.err
    assert f" backbone.name={model_folder} task='{task}' bank=BANK " in said.err
    short[-1] = str(tmp_path / "elastic")
    small = ["max_rate=4", "unseen=2", "loop.steps=1"]
    assert main(["elastic", "elastic-small-data", *common, *small, *short]) == 0
    said = capsys.readouterr()
    assert f"={tmp_path / 'elastic' / 'model'}\n" in said.err
    assert f"evaluate every-rate backbone.name={tmp_path / 'elastic' / 'model'} " in said.err


def test_a_cascade_is_attached_where_there_is_a_folder(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    (tmp_path / "cascade.md").write_text("| a |\n|---|\n| 1 |\n")
    path = tmp_path / "cascade.json"
    monkeypatch.setattr("training.cascade.calibrate.calibrate_cascade", lambda *_: path)
    for name, told in ((str(model_folder), True), ("bundled:deit_tiny", False)):
        assert main(["calibrate-cascade", "cascade", f"backbone.name={name}", "pictures=x"]) == 0
        said = capsys.readouterr().err
        assert (f"tocom-train attach {path} {name}\n" in said) == told
        assert f"={name},cascade={path}\n" in said


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


@pytest.mark.parametrize(
    ("command", "needs"),
    [
        ("calibrate multiplier", ("backbone.name", "pictures", "bank")),
        ("compare methods", ("backbone.name", "pictures")),
        ("search half-the-compute", ("backbone.name", "pictures")),
        ("vtab vtab1k", ("root",)),
    ],
)
def test_what_measures_is_one_process(
    pictures: Path, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str], command: str, needs: tuple[str, ...],
) -> None:  # fmt: skip
    monkeypatch.setenv("WORLD_SIZE", "2")  # torchrun and accelerate launch do
    there = {"backbone.name": model_folder, "pictures": pictures, "bank": "x", "root": tmp_path}
    given = [f"{key}={there[key]}" for key in needs]
    assert main([*command.split(), *given, "--folder", str(tmp_path / "run")]) == 2
    name = command.split(maxsplit=1)[0]
    assert f"{name} runs in one process, got 2 of torchrun" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["distill", "nope"], "no recipe file and no preset 'nope'"),
        (
            ["distill", "deit-tiny-small-data"],
            "pictures is missing: to learn from: pictures=",
        ),
        (
            [
                "distill",
                "deit-tiny-small-data",
                "backbone.name=FOLDER",
                "pictures=[{path='nowhere'}]",
            ],
            "there are no pictures at nowhere",
        ),
        (
            ["finetune", "deit-tiny-task", "pictures.path=a"],
            "test is missing: to test on: test=",
        ),
    ],
)
def test_mistakes_are_one_message_and_exit_2(
    arguments: list[str], message: str, model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([argument.replace("FOLDER", str(model_folder)) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert "\ntocom-train: " in f"\n{error}"  # below what was being loaded
    assert message in error


def test_what_the_system_refuses_is_one_message_and_exit_2(
    pictures: Path, model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    given = [f"backbone.name={model_folder}", f"pictures={pictures}", "max_rate=1"]
    run = ["--folder", str(tmp_path / "file" / "run")]
    assert main(["evaluate", "every-rate", *given, *run]) == 2
    assert "\ntocom-train: [Errno " in f"\n{capsys.readouterr().err}"


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
    [
        (["distill", "x", "--rank", "1"], "no option --rank; keys of a recipe are key=value"),
        (["attach", "a", "b", "c"], "unknown arguments: c"),
    ],
)
def test_unknown_arguments_are_named(
    arguments: list[str], unknown: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(arguments)
    assert unknown in capsys.readouterr().err


def test_presets_are_listed_by_command_with_a_line_each(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["presets"]) == 0
    told = capsys.readouterr().out
    assert re.findall(r"^([\w-]+)$", told, re.MULTILINE) == list(COMMANDS)
    listed = re.findall(r"^  (\S+) +(\S.*)$", told, re.MULTILINE)
    assert sorted(name for name, _ in listed) == presets()
    assert re.search(r"^evaluate\n  every-rate +A model at every rate of its bank\.", told, re.M)


@pytest.mark.parametrize("preset", presets())
def test_a_preset_is_shown_with_all_keys_of_its_command(
    preset: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["presets", "show", preset]) == 0
    told = capsys.readouterr().out
    kind = KINDS[command_of(preset)]
    assert told.startswith(find_recipe(preset).read_text())
    for key in kind.model_fields:
        assert re.search(rf"^{key}\b.* \(|^{key}(\[\])?\.", told, re.MULTILINE), key
    assert "value;" not in told  # every type has its word


def test_keys_are_shown_with_value_type_default_and_meaning(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["presets", "show", "deit-tiny-small-data"]) == 0
    told = capsys.readouterr().out
    for lines in (
        'name = "deit_tiny_patch16_224-tome"   (text; must be given)\n    the bank\'s name\n',
        "loop.accumulation   (whole number, more than 0; default 1)\n    micro-batches a step",
        'loop.on_full_disk   (stop or skip; default "stop")\n    a checkpoint or metrics',
        "pictures[].path   (text; must be given)\n    a folder, a .tar, ",
        "ladder   (tome or table; not set by default)\n",
        "augment.scale = [0.25, 1.0]   (list of: number; default [0.08, 1.0])\n",
    ):
        assert lines in told, lines


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("presets show deit-tiny-taks", "no preset 'deit-tiny-taks', did you mean deit-tiny-task?"),
        ("presets shwo x", "it is presets, or presets show NAME; got shwo x"),
        ("distill every-rate", "every-rate is a preset of evaluate; those of distill are: deit-"),
    ],
)
def test_presets_that_there_are_not(
    command: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command.split()) == 2
    assert message in capsys.readouterr().err


def test_a_dry_run_checks_and_tells_and_writes_nothing(
    pictures: Path, model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bank = random_bank(load_backbone(str(model_folder))).save(tmp_path / "bank")
    common = [f"backbone.name={model_folder}", f"pictures={pictures}"]
    count = len(open_pictures(PicturesConfig(path=str(pictures))))

    def told(*arguments: str) -> str:
        run = tmp_path / "run"
        assert main([*arguments, *common, "--dry-run", "--folder", str(run)]) == 0
        assert not run.exists()
        said = capsys.readouterr().out
        assert f"{pictures}: {count}\n" in said
        assert f"folder    {run}, new\n" in said
        return said

    distilled = ["max_rate=4", "unseen=2", "loop.steps=9", "loop.batch_size=4"]
    said = told("distill", "deit-tiny-small-data", *distilled)
    assert f"steps     9 of 4 pictures, each seen {36 / (count - 2):.3g} times; 2 held out" in said
    said = told("finetune", "deit-tiny-task", f"test={pictures}", "loop.epochs=2")
    assert "tuned     full, at rate 0\n" in said
    assert "2 epochs\n" in said
    assert "at every rate\n" in told("evaluate", "every-rate", f"bank={bank}")
    assert "the bank's own, at 4 rates\n" in told("calibrate", "multiplier", f"bank={bank}")
    assert "beside the stock model\n" in told("compare", "methods")
    assert "tries for each\n" in told("search", "half-the-compute", "search_on=9", "judge_on=9")
    assert main(["analyse", "which-tokens", *common, "--dry-run"]) == 2
    assert "need more pictures than that to be compared, got 24" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("pictures=nope.tar", "there are no pictures at nope.tar"),
        ("backbone.name=bundled:nix", "nothing bundled is called 'nix'"),
        ("bank=bundled:nix", "nothing bundled is called 'nix'"),
    ],
)
def test_a_dry_run_finds_what_is_missing(
    pictures: Path, model_folder: Path, capsys: pytest.CaptureFixture[str], change: str,
    message: str,
) -> None:  # fmt: skip
    given = [f"backbone.name={model_folder}", f"pictures={pictures}", change]
    assert main(["evaluate", "every-rate", "--dry-run", *given]) == 2
    assert message in capsys.readouterr().err


def test_a_dry_run_of_many_runs_looks_at_all_data(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    given = ["vtab", "vtab1k", f"root={tmp_path}", "tasks=['cifar','dtd']", "--dry-run"]
    given.append(f"changes=['backbone.name={model_folder}']")
    assert main(given) == 2
    assert f"{tmp_path} is not complete:" in capsys.readouterr().err
    monkeypatch.setattr("training.vtab.runs.check", lambda config: "complete")
    assert main([*given, "sources=[0,8]", "seeds=[0,1,2]"]) == 0
    assert "runs      12: 2 tasks, 2 sources, 3 seeds\n" in capsys.readouterr().out


def test_a_dry_run_refuses_a_folder_of_another_recipe(
    pictures: Path, model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["evaluate", "every-rate", f"backbone.name={model_folder}", f"pictures={pictures}"]
    run = ["--folder", str(tmp_path / "run")]
    assert main([*given, "max_rate=1", *run]) == 0
    assert main([*given, "max_rate=1", *run, "--dry-run"]) == 0
    assert "run, gone on with\n" in capsys.readouterr().out
    assert main([*given, "max_rate=2", *run, "--dry-run"]) == 2
    assert "a run of another recipe: max_rate 1 there, 2 here" in capsys.readouterr().err
