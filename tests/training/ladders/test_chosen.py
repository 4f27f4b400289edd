"""Recipes for a ladder: a bank is distilled on it, and what is tuned and measured says it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from adapters import Bank, BankInfo, TaskModel, compose, open_bank
from adapters.ladder import LadderInfo, LadderPart, digest, write_ladder
from tests.training.test_distill import recipe as distilling
from tests.training.test_finetune import recipe as finetuning
from tocom import TOME, BankError, ConfigError, Ladder, RateError, forward, load_backbone
from tocom.reduction import ToMe
from tocom.vit import State
from training.calibrate import calibrate
from training.config import DistillConfig
from training.distill import distill
from training.evaluate import evaluate, table
from training.finetune import finetune
from training.ladders.chosen import chosen_ladder, measured_ladder
from training.losses import token_error
from training.measuring_config import CalibrateConfig, EvaluateConfig
from training.pictures.batches import evaluation_batches
from training.vtab.config import VtabConfig
from training.vtab.runs import Run, _recipe
from training.vtab.tasks import VTAB

UNEVEN = Ladder("uneven", ToMe(), ((0, 0), (0, 2), (3, 2), (5, 3)), 16)


@pytest.fixture(scope="module")
def ladder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ladder")
    write_ladder(LadderInfo.of(UNEVEN, {"kl": [0.0]}), folder / "ladder.json")
    return folder


@pytest.fixture(scope="module")
def bank(
    pictures: Path, model_folder: Path, ladder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    config = distilling(
        pictures, model_folder, max_rate=3, ladder=str(ladder), loop={"steps": 2, "save_every": 1}
    )
    return distill(config, tmp_path_factory.mktemp("run") / "distill")


@pytest.fixture
def config(pictures: Path, model_folder: Path, bank: Path) -> EvaluateConfig:
    said = {"backbone": {"name": str(model_folder)}, "pictures": {"path": str(pictures)}}
    return EvaluateConfig.model_validate(said | {"bank": str(bank), "workers": 0})


def changed(config: EvaluateConfig, **changes: Any) -> EvaluateConfig:
    return EvaluateConfig.model_validate(config.model_dump() | changes)


def test_the_name_of_a_method_around_the_mlp_is_its_papers_ladder(
    pictures: Path, model_folder: Path
) -> None:
    model = load_backbone(str(model_folder)).model
    said = {"backbone": {"name": "x"}, "pictures": {"path": "x"}, "ladder": "around-mlp"}
    ladder = chosen_ladder(EvaluateConfig.model_validate(said).ladder, model)
    assert ladder.top == 16
    assert [rung[0] for rung in ladder.rungs or ()] == [round(rung / 2) for rung in range(17)]
    shared = said | {"ladder": {"method": "around-mlp", "shares": [0.9]}}
    assert chosen_ladder(EvaluateConfig.model_validate(shared).ladder, model).top == 1


def test_a_recipe_takes_a_file_a_folder_a_method_or_the_papers(ladder: Path) -> None:
    def asked(choice: Any) -> Any:
        return EvaluateConfig.model_validate(
            {"backbone": {"name": "x"}, "pictures": {"path": "x"}, "ladder": choice}
        )

    for choice in (str(ladder), str(ladder / "ladder.json")):
        read = asked(choice).ladder
        assert read.ladder() == UNEVEN
        assert asked(read.model_dump()).ladder == read
    assert asked("tome").ladder == "tome"
    assert asked(None).ladder is None
    assert asked({"method": "tome", "shares": [0.5]}).ladder.shares == (0.5,)
    with pytest.raises(ValidationError, match="cannot read the ladder none"):
        asked("none.json")
    with pytest.raises(ValidationError, match="rung 0"):
        asked(
            {
                **LadderInfo.of(UNEVEN).model_dump(exclude={"format_version", "evidence"}),
                "rungs": [[1, 1]],
            }
        )


def test_a_ladder_is_made_for_the_model(model_folder: Path, ladder: Path) -> None:
    model = load_backbone(str(model_folder)).model
    assert chosen_ladder(None, model) == chosen_ladder("tome", model) == TOME
    said = {"backbone": {"name": "x"}, "pictures": {"path": "x"}, "ladder": {"method": "tome"}}
    made = chosen_ladder(EvaluateConfig.model_validate(said).ladder, model)
    assert made.top is not None
    assert (made.name, made.method, made.patches) == ("tome", ToMe(), 16)


def test_a_bank_is_distilled_on_a_ladder(bank: Path, model_folder: Path) -> None:
    made = Bank.load(bank)
    assert (made.ladder, made.info.max_rate, made.info.format_version) == (UNEVEN, 3, 2)
    assert "ladder" not in made.info.training["recipe"]
    made.check_fits(load_backbone(str(model_folder)))
    assert compose(made, 0, 3).pairs
    with pytest.raises(RateError, match=r"must be in 0\.\.3, got 4"):
        compose(made, 0, 4)


def test_a_run_keeps_its_ladder_whatever_becomes_of_the_file(
    pictures: Path, model_folder: Path, tmp_path: Path
) -> None:
    path = write_ladder(LadderInfo.of(UNEVEN), tmp_path / "ladder.json")

    def config() -> DistillConfig:
        loop = {"steps": 1, "save_every": 1}
        return distilling(pictures, model_folder, max_rate=3, ladder=str(path), loop=loop)

    folder = distill(config(), tmp_path / "run")
    said = json.loads((tmp_path / "run" / "config.json").read_text())
    assert said["ladder"]["rungs"] == [list(rung) for rung in UNEVEN.rungs or ()]
    assert distill(config(), tmp_path / "run") == folder
    other = Ladder("uneven", ToMe(), ((0, 0), (1, 2), (3, 2), (5, 3)), 16)
    write_ladder(LadderInfo.of(other), path)
    with pytest.raises(ConfigError, match=r"another recipe: ladder\..* there, .* here"):
        distill(config(), tmp_path / "run")


def test_a_recipe_may_take_the_ladder_of_a_bank(pictures: Path, model_folder: Path) -> None:
    config = distilling(pictures, model_folder, max_rate=3, ladder="bundled:deit_tiny_bank")
    assert isinstance(config.ladder, LadderPart)
    assert config.ladder.ladder() == open_bank("bundled:deit_tiny_bank").ladder


def test_rates_beyond_the_ladder_are_refused(
    pictures: Path, model_folder: Path, ladder: Path, tmp_path: Path
) -> None:
    config = distilling(pictures, model_folder, max_rate=4, ladder=str(ladder))
    with pytest.raises(ConfigError, match=r"max_rate \(4\) .* at most 3 on the ladder 'uneven'"):
        distill(config, tmp_path / "run")
    config = distilling(pictures, model_folder, max_rate=99)
    with pytest.raises(ConfigError, match=r"max_rate \(99\) .* at most 16 on the ladder 'tome'"):
        distill(config, tmp_path / "run")
    tuning = finetuning(pictures, model_folder, source=4, ladder=str(ladder))
    with pytest.raises(RateError, match="the rates of the ladder 'uneven' are 0 to 3, got 4"):
        finetune(tuning, tmp_path / "tuning")


def test_rungs_beyond_are_trained_and_left_out(
    pictures: Path, model_folder: Path, ladder: Path, tmp_path: Path
) -> None:
    config = distilling(
        pictures, model_folder, max_rate=2, beyond=1, relative=True, ladder=str(ladder),
        loop={"steps": 1},
    )  # fmt: skip
    made = Bank.load(distill(config, tmp_path / "run"))
    assert made.ladder.rungs == UNEVEN.rungs[:3]  # type: ignore[index]
    assert made.info.max_rate == 2


def test_an_evaluation_is_on_the_ladder_of_the_bank(config: EvaluateConfig, tmp_path: Path) -> None:
    backbone, bank = load_backbone(config.backbone.name), Bank.load(str(config.bank))
    result = json.loads(evaluate(config, tmp_path).read_text())
    assert result["ladder"] == {"name": "uneven", "method": "tome", "digest": digest(UNEVEN)}
    assert [row["target"] for row in result["rows"]] == [0, 1, 2, 3]
    assert [row["tokens"] for row in result["rows"]] == [17, 15, 12, 9]
    assert "pictures.tar on the ladder uneven; plain merging" in table(result)
    ((images, _),) = evaluation_batches(backbone, [config.pictures])
    stock = forward(backbone.model, images).log_softmax(-1)
    delta = compose(bank, 0, 3)
    answer = forward(backbone.model, images, 3, delta, ladder=UNEVEN).log_softmax(-1)
    kl = (stock.exp() * (stock - answer)).sum(-1).mean().item()
    assert result["rows"][3]["bank"]["kl"] == pytest.approx(kl, rel=1e-3, abs=1e-6)


def test_without_a_bank_the_recipe_says_the_ladder(
    config: EvaluateConfig, ladder: Path, tmp_path: Path
) -> None:
    result = json.loads(
        evaluate(changed(config, bank=None, ladder=str(ladder)), tmp_path / "1").read_text()
    )
    assert [row["tokens"] for row in result["rows"]] == [17, 15, 12, 9]
    papers = json.loads(
        evaluate(changed(config, bank=None, max_rate=1), tmp_path / "2").read_text()
    )
    assert papers["ladder"]["name"] == "tome"
    assert "ladder" not in table(papers)
    with pytest.raises(ConfigError, match="'tiny' is for the ladder 'uneven', not for 'tome'"):
        evaluate(changed(config, ladder="tome"), tmp_path / "3")


@pytest.mark.parametrize("method", ["full", "adaptformer"])
def test_what_was_tuned_says_its_ladder(
    method: str, config: EvaluateConfig, pictures: Path, ladder: Path, tmp_path: Path
) -> None:
    tuning = finetuning(
        pictures, Path(config.backbone.name), method=method, source=2, ladder=str(ladder),
        loop={"epochs": 1, "batch_size": 24, "learning_rate": 1e-3, "workers": 0},
    )  # fmt: skip
    folder = finetune(tuning, tmp_path / "run")
    stock = load_backbone(config.backbone.name)
    if method == "full":
        tuned = load_backbone(str(folder))
    else:
        task = TaskModel.load(folder)
        tuned = task.on(stock)
        assert "ladder" not in task.info.training["recipe"]
    assert (tuned.source, tuned.ladder) == (2, UNEVEN)
    assert measured_ladder(None, tuned, None, [2]) == UNEVEN
    with pytest.raises(ConfigError, match="was tuned at rate 2 of the ladder 'uneven', not of"):
        measured_ladder("tome", tuned, None, [2])
    assert measured_ladder("tome", tuned, None, [0]) == TOME
    info = BankInfo.model_validate(
        Bank.load(str(config.bank)).info.model_dump(exclude={"format_version", "ladder", "digest"})
    )
    papers = Bank(info, Bank.load(str(config.bank)).tensors)
    with pytest.raises(BankError, match="bank 'tiny' is for the ladder 'tome': .* 'uneven'"):
        papers.check_fits(tuned)


def test_a_calibration_is_on_the_ladder_of_the_bank(
    config: EvaluateConfig, pictures: Path, tmp_path: Path
) -> None:
    asked = CalibrateConfig.model_validate(
        {"backbone": config.backbone, "bank": config.bank, "pictures": config.pictures,
         "multipliers": [0.5], "workers": 0}
    )  # fmt: skip
    result = json.loads(calibrate(asked, tmp_path).read_text())
    assert result["ladder"]["name"] == "uneven"
    assert {row["target"] for row in result["tried"]} == {1, 2, 3, "all"}
    assert "on the ladder uneven: KL" in (tmp_path / "calibration.md").read_text()


def test_vtab_hands_its_ladder_on(ladder: Path) -> None:
    said = {"root": "x", "recipe": "vtab1k-adaptformer", "changes": ["backbone.name=x"]}
    config = VtabConfig.model_validate(said | {"ladder": str(ladder)})
    assert _recipe(config, Run(VTAB[0], 2, 0)).ladder == config.ladder
    assert _recipe(VtabConfig.model_validate(said), Run(VTAB[0], 2, 0)).ladder is None


def test_the_error_of_tokens_leaves_out_those_that_were_dropped() -> None:
    whole = torch.tensor([[[1.0], [2.0], [4.0]]], requires_grad=True)
    student = State(whole, None, torch.tensor([[0, 1, 2]]), None)
    kept = State(torch.tensor([[[1.0], [3.0]]]), None, torch.tensor([[0, -1, 1]]), None)
    error = token_error([student], [kept])
    torch.testing.assert_close(error, torch.tensor(0.25))  # (4 - 3)², of two tokens, variance 2
    error.backward()
    assert whole.grad is not None
    assert whole.grad.flatten()[1] == 0
    # A token whose inputs the other side dropped has nothing to be compared with.
    merged = State(torch.tensor([[[1.0], [9.0]]]), None, torch.tensor([[0, 1, 1]]), None)
    lost = State(torch.tensor([[[1.0], [5.0]]]), None, torch.tensor([[0, -1, -1]]), None)
    torch.testing.assert_close(token_error([merged], [lost]), torch.tensor(0.0))
