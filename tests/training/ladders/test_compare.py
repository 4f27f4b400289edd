"""Methods side by side: figures are those of single forwards, and the best are marked."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from adapters.ladder import LadderInfo, write_ladder
from tests.tocom.reduction.learning import drawn_weights
from tocom import Ladder, ReductionError, cost, forward, load_backbone
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
        ([{"ladder": "a", "name": "b"}], ValueError, "a ladder brings its method"),
    ],
)
def test_what_is_wrong_is_named(
    entries: list[dict[str, str]], error: type[Exception], message: str,
    pictures: Path, model_folder: Path, tmp_path: Path,
) -> None:  # fmt: skip
    with pytest.raises(error, match=message):
        compare_methods(config(pictures, model_folder, entries=entries), tmp_path)
