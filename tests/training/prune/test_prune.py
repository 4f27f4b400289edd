"""Pruning a tiny model: its target, what comes out, resuming, and what is refused."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file

from adapters import open_task
from tests.training.jobs import metrics
from tocom import ConfigError, DataError, cost, forward, load_backbone
from tocom.pruned import Channels
from training.cli import main
from training.config import FinetuneConfig
from training.finetune import finetune
from training.program.dry_run import dry_run
from training.prune.config import PruneConfig
from training.prune.prune import Pruning, load, prune


def recipe(photos: Path, model_folder: Path, **changes: Any) -> PruneConfig:
    values: dict[str, Any] = {
        "backbone": {"name": str(model_folder)},
        "pictures": [{"path": str(photos)}],
        "test": {"path": str(photos)},
        "target": 0.3,
        "begin": 1,
        "every": 1,
        "growth": 0.15,
        "score": "gradient",
        "masked": True,
        "loop": {
            "steps": 4, "batch_size": 6, "learning_rate": 2e-3, "save_every": 2,
            "watch_every": 2, "workers": 0,
        },
    }  # fmt: skip
    values["loop"] |= changes.pop("loop", {})
    return PruneConfig.model_validate(values | changes)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"score": "norm", "masked": False, "teacher": 0.0, "augment": {"mixup": 0.8}},
        {"labelled": False, "unseen": 4, "ladder": "atme", "source": 1},
    ],
)
def test_it_comes_down_to_its_target(
    pictures: Path, model_folder: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    config = recipe(pictures, model_folder, **changes)
    made = prune(config, tmp_path / "run")
    pruned, backbone = load_backbone(str(made)), load(config)
    ladder, rate = backbone.ladder, backbone.source
    assert (pruned.source, pruned.class_names) == (rate, ("blue", "green", "red"))
    assert pruned.ladder.rungs == ladder.rungs
    before, after = (cost(each.model, rate, ladder=ladder).macs for each in (backbone, pruned))
    assert 0.65 * before < after <= 0.7 * before
    said = json.loads((made / "config.json").read_text())["training"]
    assert (said["before"]["macs"], said["after"]["macs"]) == (before, after)
    assert 0 <= said["after"]["top1"] <= 1
    assert prune(config, tmp_path / "run") == made
    chosen = [line.get("chosen") for line in metrics(tmp_path / "run")]
    assert chosen == [None, 0.15, 0.3, None]


def test_a_resumed_run_is_the_same(pictures: Path, model_folder: Path, tmp_path: Path) -> None:
    whole = prune(recipe(pictures, model_folder), tmp_path / "whole")
    limited = recipe(pictures, model_folder, loop={"time_limit": 1e-9, "save_every": 1})
    stops = 0
    while True:
        try:
            resumed = prune(limited, tmp_path / "stopped")
            break
        except KeyboardInterrupt:
            stops += 1
    assert stops == 4
    one, other = (load_file(each / "model.safetensors") for each in (whole, resumed))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_longer_run_tests_what_itself_made(
    pictures: Path, model_folder: Path, tmp_path: Path
) -> None:
    prune(recipe(pictures, model_folder), tmp_path / "run")
    tested = tmp_path / "run" / "test-after.json"
    stale = json.loads(tested.read_text())
    stale["sums"][0] = -1000.0  # what would be seen if it counted again
    tested.write_text(json.dumps(stale))
    longer = prune(recipe(pictures, model_folder, loop={"steps": 6}), tmp_path / "run")
    assert json.loads((longer / "config.json").read_text())["training"]["after"]["top1"] >= 0
    assert tested.with_name("test-after-4-steps.json").exists()


def test_a_task_with_branches_comes_out_beside_its_model(
    pictures: Path, model_folder: Path, tmp_path: Path
) -> None:
    values = {
        "name": "colours",
        "backbone": {"name": str(model_folder)},
        "pictures": {"path": str(pictures)},
        "test": {"path": str(pictures)},
        "method": "adaptformer",
        "adaptformer": {"bottleneck": 2},
        "loop": {"epochs": 0.5, "batch_size": 6, "learning_rate": 1e-2, "workers": 0},
    }
    task = finetune(FinetuneConfig.model_validate(values), tmp_path / "tuned")
    config = recipe(pictures, model_folder, task=str(task))
    made = prune(config, tmp_path / "run")
    backbone = load_backbone(str(made))
    assert backbone.model.num_classes == 0
    pruned = open_task(tmp_path / "run" / "task").on(backbone)
    assert pruned.class_names == ("blue", "green", "red")
    assert pruned.adapter is not None
    assert forward(pruned.model, torch.zeros(1, *pruned.input_size)).shape == (1, 3)
    assert prune(config, tmp_path / "run") == made


def test_the_command_tells_what_it_made(
    pictures: Path, model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [f"backbone.name={model_folder}", f"pictures={pictures}", f"test={pictures}"]
    short = ["loop.steps=2", "loop.batch_size=4", "begin=0", "growth=0.25", "loop.workers=0"]
    folder = tmp_path / "run"
    recipe = "prune-deit-tiny-task"
    assert main(["prune", recipe, *given, *short, "--folder", str(folder)]) == 0
    said = capsys.readouterr()
    assert said.out == f"{folder / 'model'}\n"
    assert re.search(
        r"^before  0\.\d{4} GMACs, .* M parameters, \d+\.\d\d % right$", said.err, re.M
    )
    assert f"tocom-serve --model {recipe}={folder / 'model'}\n" in said.err


def test_a_dry_run_says_what_goes(pictures: Path, model_folder: Path, tmp_path: Path) -> None:
    said = dry_run(recipe(pictures, model_folder), tmp_path / "run")
    assert "30 % of the multiply-adds, by step 3" in said


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"growth": 0.1}, r"target 0.3 is reached after step 3, and the run has 3"),
        ({"labelled": False, "teacher": 0.0}, "without labels there is the teacher alone"),
        ({"pictures": ["a.tar", "b.tar"]}, "labelled pictures are one set, got 2"),
        (
            {"pictures": {"path": "a", "list": "a.txt", "labels": "many"}},
            "a has labels=many: .* labels=one",
        ),
        (
            {"test": {"path": "b", "list": "b.txt", "labels": "many"}},
            "b has labels=many: .* labels=one",
        ),
    ],
)
def test_a_recipe_that_cannot_be_is_refused(
    pictures: Path, model_folder: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValidationError, match=message):
        recipe(pictures, model_folder, loop={"steps": 3}, **changes)


def test_scaled_gradients_do_not_score_channels(pictures: Path, model_folder: Path) -> None:
    fp16 = {"precision": "fp16"}
    with pytest.raises(ValidationError, match=r"score=gradient .* loop.precision=bf16 or no"):
        recipe(pictures, model_folder, loop=fp16)
    assert recipe(pictures, model_folder, score="norm", loop=fp16).score == "norm"


def test_a_test_of_other_classes_is_told_before_any_compute(
    pictures: Path, model_folder: Path, tmp_path: Path
) -> None:
    for name in ("cat", "dog"):
        shutil.copytree(pictures.parent / "red", tmp_path / "other" / name)
    config = recipe(pictures, model_folder, test={"path": str(tmp_path / "other")})
    for run in (prune, dry_run):
        with pytest.raises(DataError, match=r"neither numbers nor names of .* without `test`"):
            run(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_classes_that_are_not_the_model_s_play_no_part(pictures: Path, model_folder: Path) -> None:
    config = recipe(pictures, model_folder, labelled=False, augment={"mixup": 0.8})
    job = Pruning(load(config), config, [])
    (loss,) = job.losses(torch.zeros(4, 3, 32, 32), torch.tensor([-1, 3, 900, 0]), 0)
    assert loss.isfinite()


def test_it_is_watched_without_the_wrapper_of_several_processes(
    pictures: Path, model_folder: Path
) -> None:
    config = recipe(pictures, model_folder)
    job = Pruning(load(config), config, [torch.zeros(2, 3, 32, 32)])
    job.module = torch.nn.Module()  # has no forward
    assert job.watch() == {"unseen_kl_0": pytest.approx(0, abs=1e-5)}


def test_a_model_of_several_classes_a_picture_is_refused(
    pictures: Path, model_folder: Path
) -> None:
    config = recipe(pictures, model_folder, labelled=False)
    with pytest.raises(ConfigError, match="scores several classes a picture; pruned are"):
        Pruning(replace(load(config), multi_label=True), config, [])


def test_a_ladder_of_a_learned_method_is_refused(pictures: Path, model_folder: Path) -> None:
    config = recipe(pictures, model_folder, ladder="dynamicvit", source=1)
    with pytest.raises(ConfigError, match=r"cannot be pruned on .* 'dynamicvit' is learned; give"):
        Pruning(load(config), config, [])


def test_more_than_can_go_is_refused(pictures: Path, model_folder: Path) -> None:
    config = recipe(pictures, model_folder, target=0.98, growth=0.98)
    with pytest.raises(ConfigError, match=r"target=0.98: of .* at most 0\.\d+ of the multiply"):
        Pruning(load(config), config, [])


def test_a_pruned_model_is_not_pruned_again(
    pictures: Path, model_folder: Path, tmp_path: Path
) -> None:
    made = prune(recipe(pictures, model_folder, test=None), tmp_path / "run")
    config = recipe(pictures, made)
    assert Channels.of(load_backbone(str(made)).model) is not None
    with pytest.raises(ConfigError, match="is pruned already"):
        Pruning(load(config), config, [])
