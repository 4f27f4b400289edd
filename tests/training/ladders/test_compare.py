"""Methods side by side: figures are those of single forwards, and the best are marked."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from adapters import Bank, compose
from adapters.ladder import LadderInfo, write_ladder
from tests.tocom.reduction.learning import drawn_weights
from tests.training.banks import random_bank
from tocom import ConfigError, Ladder, ReductionError, cost, forward, load_backbone
from tocom.reduction import METHODS, ToMe, method_of
from training.ladders.chosen import usual_ladder
from training.ladders.compare import compare_methods
from training.ladders.compare_config import CompareConfig
from training.pictures.batches import evaluation_batches

RUNGS = ((0, 0), (3, 0), (6, 2))


@pytest.fixture
def ladder(tmp_path: Path) -> Path:
    info = LadderInfo.of(Ladder("mine", ToMe(importance=0.05), RUNGS, 16))
    return write_ladder(info, tmp_path / "ladder.json")


def config(pictures: Path, model_folder: Path, **changes: Any) -> CompareConfig:
    said = {
        "backbone": {"name": str(model_folder)},
        "pictures": {"path": str(pictures)},
        "entries": [{"method": "tome"}],
        "shares": [0.9, 0.8],
        "batch_size": 7,
        "workers": 0,
    }
    return CompareConfig.model_validate(said | changes)


@pytest.mark.rendered
def test_figures_are_those_of_single_forwards(
    pictures: Path, model_folder: Path, ladder: Path, tmp_path: Path
) -> None:
    asked = config(
        pictures, model_folder, entries=[{"method": "tome"}, {"ladder": str(ladder)}],
        pixels=[16], time_batches=[1], repeats=1,
    )  # fmt: skip
    path = compare_methods(asked, tmp_path / "run")
    result = json.loads(path.read_text())
    rows = {(row["name"], row["rung"]): row for row in result["rows"]}
    assert set(rows) == {
        ("stock", 0), ("tome", 1), ("tome", 2), ("mine", 1), ("mine", 2), ("smaller pictures", 16),
    }  # fmt: skip
    backbone = load_backbone(str(model_folder))
    ((images, _),) = evaluation_batches(backbone, [asked.pictures])
    stock = forward(backbone.model, images).log_softmax(-1)
    mine = Ladder("mine", ToMe(importance=0.05), RUNGS, 16)
    answer = forward(backbone.model, images, 2, ladder=mine).log_softmax(-1)
    row = rows["mine", 2]
    kl = (stock.exp() * (stock - answer)).sum(-1).mean()
    assert row["kl"] == pytest.approx(kl.item(), rel=1e-3, abs=1e-6)
    agreed = (answer.argmax(-1) == stock.argmax(-1)).double().mean()
    assert row["agreement"] == pytest.approx(100 * agreed.item())
    assert row["gmacs"] == cost(backbone.model, 2, ladder=mine).macs / 1e9
    assert rows["stock", 0]["kl"] == 0
    assert rows["stock", 0]["best"]
    assert rows["smaller pictures", 16]["share"] < 0.5
    assert all("eager x1" in row["ms"] for row in rows.values())
    text = (tmp_path / "run" / "compare.md").read_text()
    assert "| smaller pictures | 16 |" in text
    assert (tmp_path / "run" / "compare.png").stat().st_size > 0
    assert compare_methods(asked, tmp_path / "run") == path  # not measured again


@pytest.fixture
def banks(model_folder: Path, tmp_path: Path) -> list[Path]:
    bank = random_bank(load_backbone(str(model_folder)), scale=0.1)
    unnamed = bank.info.model_copy(update={"digest": ""})
    other = Bank(unnamed, {name: 1.5 * each for name, each in bank.tensors.items()})
    return [bank.save(tmp_path / "bank"), other.save(tmp_path / "other")]


def test_a_bank_runs_beside_plain_with_its_seeds_and_is_tested_in_pairs(
    pictures: Path, model_folder: Path, banks: list[Path], tmp_path: Path
) -> None:
    entries = [{"bank": [str(bank) for bank in banks], "name": "mine"}, {"method": "topk"}]
    asked = config(pictures, model_folder, entries=entries, judge="agreement")
    result = json.loads(compare_methods(asked, tmp_path / "run").read_text())
    rows = {(row["name"], row["rung"], row["bank"]): row for row in result["rows"]}
    rungs = {rung for name, rung, _ in rows if name == "mine"}
    backbone = load_backbone(str(model_folder))
    ((images, _),) = evaluation_batches(backbone, [asked.pictures])
    stock = forward(backbone.model, images).log_softmax(-1)
    rung = max(rungs)
    kls = []
    for folder in banks:
        delta = compose(Bank.load(folder), 0, rung)
        answer = forward(backbone.model, images, rung, delta).log_softmax(-1)
        kls.append((stock.exp() * (stock - answer)).sum(-1))
    row = rows["mine", rung, True]
    assert row["kl"] == pytest.approx(torch.cat(kls).mean().item(), rel=1e-3)
    spread = torch.stack(kls).mean(dim=1).std().item()
    assert row["seeds"] == {"count": 2} | row["seeds"]
    assert row["seeds"]["kl"] == pytest.approx(spread, rel=1e-2)
    assert rows["mine", rung, False]["kl_se"] > 0
    assert (
        row["parameters"]
        > rows["mine", rung, False]["parameters"]
        == rows["stock", 0, False]["parameters"]
    )
    for budget in result["budgets"]:
        fitting = [r for r in result["rows"] if r["share"] <= budget["share"] * 1.005]
        best = rows[tuple(budget["best"].values())]
        assert best["agreement"] == max(r["agreement"] for r in fitting)
        assert {(r["name"], r["bank"]) for r in [budget["best"], *budget["rivals"]]} == {
            (r["name"], r["bank"]) for r in fitting
        }
        for rival in budget["rivals"]:
            other = rows[rival["name"], rival["rung"], rival["bank"]]
            assert rival["kl_more"] == pytest.approx(other["kl"] - best["kl"])
            assert 0 < rival["top1_p"] <= 1
    text = (tmp_path / "run" / "compare.md").read_text()
    assert "| mine + bank |" in text
    assert result["banks"] == {"mine": [Bank.load(folder).info.digest for folder in banks]}
    assert "by agreement" in text
    again = json.loads(compare_methods(asked, tmp_path / "again").read_text())
    assert again == result  # from the same command the same numbers


def test_a_bank_or_a_ladder_that_changed_meanwhile_is_noticed(
    pictures: Path, model_folder: Path, banks: list[Path], ladder: Path, tmp_path: Path
) -> None:
    entries = [{"bank": str(banks[0]), "name": "a.bank"}, {"ladder": str(ladder)}]
    asked = config(pictures, model_folder, entries=entries)
    path = compare_methods(asked, tmp_path / "run")
    assert compare_methods(asked, tmp_path / "run") == path
    shutil.rmtree(banks[0])
    shutil.copytree(banks[1], banks[0])
    write_ladder(LadderInfo.of(Ladder("mine", ToMe(), RUNGS, 16)), ladder)
    other = r"with other models, tasks, ladders or banks of a\.bank, mine; choose another run"
    with pytest.raises(ConfigError, match=other):
        compare_methods(asked, tmp_path / "run")


def test_a_model_of_its_own_has_its_rung_0_and_must_have_the_same_classes(
    pictures: Path, model_folder: Path, tmp_path: Path
) -> None:
    own = {"backbone": {"name": str(model_folder)}, "name": "tuned"}
    asked = config(pictures, model_folder, entries=[own])
    result = json.loads(compare_methods(asked, tmp_path / "run").read_text())
    names = {(row["name"], row["rung"]): row["kl"] for row in result["rows"]}
    assert names["tuned", 0] == 0
    assert {name for name, _ in names} == {"stock", "tuned"}
    other = {"backbone": {"name": "bundled:deit_tiny"}, "method": "tome"}
    with pytest.raises(ConfigError, match=r"'tome' answers 1000 classes .* must be the same"):
        compare_methods(config(pictures, model_folder, entries=[other]), tmp_path / "other")


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_a_usual_ladder(name: str, model_folder: Path) -> None:
    model, method = load_backbone(str(model_folder)).model, method_of(name)
    ladder = usual_ladder(method, model, (0.95, 0.85, 0.75), name)
    assert ladder.top
    shares = [cost(model, rung, ladder=ladder).macs for rung in range(ladder.top + 1)]
    assert shares == sorted(shares, reverse=True)
    learned = drawn_weights(ladder, model)
    forward(model, torch.zeros(1, 3, 32, 32), ladder.top, ladder=ladder, learned=learned)


@pytest.mark.parametrize(
    ("entries", "error", "message"),
    [
        ([{"method": "magic"}], ReductionError, "there is no method 'magic'"),
        ([{"method": "sit"}], ReductionError, "'sit' runs with weights that are learned"),
        ([{"ladder": "none.json"}], ReductionError, "cannot read the ladder"),
        ([{}], ValueError, "give either a method or a ladder"),
        ([{"method": "tome", "bank": "b"}], ValueError, "give either a method or a ladder"),
        ([{"ladder": "a", "options": {"size": 1}}], ValueError, "a ladder brings its method"),
        ([{"bank": ["a", "b"], "task": ["a", "b", "c"]}], ValueError, "one or 3, got 2 of bank"),
        ([{"method": "tome"}, {"method": "tome"}], ConfigError, "two entries are called 'tome'"),
    ],
)
def test_what_is_wrong_is_named(
    entries: list[dict[str, str]], error: type[Exception], message: str,
    pictures: Path, model_folder: Path, tmp_path: Path,
) -> None:  # fmt: skip
    with pytest.raises(error, match=message):
        compare_methods(config(pictures, model_folder, entries=entries), tmp_path)
