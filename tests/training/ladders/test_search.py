"""Searching ladders: nested rungs within their budgets, better than where it began, resumable."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from adapters.ladder import read_ladder
from tocom import ConfigError, ReductionError, cost, load_backbone
from training.ladders import search as module
from training.ladders.search import search
from training.ladders.search_config import LadderSearchConfig

SHARES = (0.95, 0.85, 0.75)


def config(pictures: Path, model_folder: Path, **changes: Any) -> LadderSearchConfig:
    return LadderSearchConfig.model_validate(
        {
            "backbone": {"name": str(model_folder)},
            "pictures": [{"path": str(pictures)}],
            "search_on": 6,
            "judge_on": 4,
            "shares": SHARES,
            "tries": 8,
            "batch_size": 3,
            "save_every": 3,
            "workers": 0,
        }
        | changes
    )


@pytest.mark.parametrize("method", ["tome", "dpcknn", "around-mlp"])
def test_rungs_are_within_their_budgets_and_nested(
    method: str, pictures: Path, model_folder: Path, tmp_path: Path
) -> None:
    # Around the MLP half of what that costs is all that can be saved.
    shares = (0.95, 0.9, 0.85) if method == "around-mlp" else SHARES
    path = search(config(pictures, model_folder, method=method, shares=shares), tmp_path)
    model, ladder = load_backbone(str(model_folder)).model, read_ladder(path).ladder()
    costs = [cost(model, rung, ladder=ladder) for rung in range(4)]
    for share, rung in zip(shares, costs[1:], strict=True):
        assert rung.macs <= share * costs[0].macs
    for dearer, cheaper in pairwise(costs):
        assert cheaper.macs < dearer.macs
        # What a rung leaves in each block is no less than the next one's.
        pairs = zip(dearer.plan.reduced, cheaper.plan.reduced, strict=True)
        assert all(more >= fewer for more, fewer in pairs)


@pytest.mark.rendered
def test_what_is_kept_is_never_worse_and_the_evidence_says_what_was_found(
    pictures: Path, model_folder: Path, tmp_path: Path
) -> None:
    few = read_ladder(search(config(pictures, model_folder, tries=1), tmp_path / "few"))
    many = read_ladder(search(config(pictures, model_folder, tries=40), tmp_path / "many"))
    cheapest = [info.evidence["rows"][-1]["kl_search"] for info in (few, many)]
    assert cheapest[1] <= cheapest[0]
    rows = many.evidence["rows"]
    assert [row["rung"] for row in rows] == [0, 1, 2, 3]
    assert rows[0]["kl"] == 0
    assert rows[0]["agreement"] == 1
    assert many.evidence["searched_on"] == 6
    assert many.evidence["judged_on"] == 4
    text = (tmp_path / "many" / "search.md").read_text()
    assert f"| {rows[3]['share']:.3f} |" in text
    assert (tmp_path / "many" / "search.png").stat().st_size > 0


def test_a_killed_search_goes_on_to_the_same_ladder(
    pictures: Path, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = search(config(pictures, model_folder), tmp_path / "whole").read_text()
    run, tries = module.Search._change, []

    def killed(*arguments: Any) -> Any:
        tries.append(1)
        if len(tries) == 13:
            raise KeyboardInterrupt
        return run(*arguments)

    monkeypatch.setattr(module.Search, "_change", killed)
    with pytest.raises(KeyboardInterrupt):
        search(config(pictures, model_folder), tmp_path / "part")
    state = json.loads((tmp_path / "part" / "state.json").read_text())
    assert 0 < sum(found["tries"] for found in state.values()) < 13
    assert search(config(pictures, model_folder), tmp_path / "part").read_text() == whole
    # A finished one is returned as it is.
    assert search(config(pictures, model_folder), tmp_path / "part").read_text() == whole


def test_a_search_may_begin_with_another_ladder(
    pictures: Path, model_folder: Path, tmp_path: Path
) -> None:
    begun = search(config(pictures, model_folder, tries=40), tmp_path / "begun")
    asked = config(pictures, model_folder, tries=1, start=str(begun))
    found = read_ladder(search(asked, tmp_path / "found"))
    # Each rung begins with its own, but for what its try changes and the cost of places.
    for before, after in zip(
        read_ladder(begun).evidence["rows"][1:], found.evidence["rows"][1:], strict=True
    ):
        assert after["kl_search"] <= before["kl_search"] * 1.05
    begun.write_text(begun.read_text().replace('"importance": 0', '"importance": 1'))
    with pytest.raises(ConfigError, match="ladders or banks of start; choose another run folder"):
        search(asked, tmp_path / "found")


def test_places_that_cost_more_are_fewer(
    pictures: Path, model_folder: Path, tmp_path: Path
) -> None:
    free = config(pictures, model_folder, tries=40, place_cost=0.0)
    dear = config(pictures, model_folder, tries=40, place_cost=[1e6] * len(free.shares))
    places = [
        sum(map(bool, (read_ladder(search(asked, tmp_path / name)).rungs or ())[1]))
        for name, asked in (("free", free), ("dear", dear))
    ]
    assert places[1] <= places[0]
    assert places[1] == 1


def test_options_are_searched_along(pictures: Path, model_folder: Path, tmp_path: Path) -> None:
    values = {"importance": [0.0, 0.05, 5.0], "metric": ["keys", "tokens"]}
    info = read_ladder(search(config(pictures, model_folder, try_options=values), tmp_path))
    for option, tried in values.items():
        assert info.method.options[option] in tried


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"method": "magic"}, ReductionError, "there is no method 'magic'"),
        ({"options": {"x": 1}}, ReductionError, "has no option 'x'"),
        ({"try_options": {"importance": [-1]}}, ReductionError, "must be a number of 0 or more"),
        ({"shares": [0.5, 0.1]}, ConfigError, r"cannot go below 0\.\d+ of the multiply-adds"),
        ({"start": "none.json"}, ReductionError, "cannot read the ladder"),
        ({"search_on": 10**6}, ConfigError, "ask for 1000004 pictures, there are"),
    ],
)
def test_what_is_wrong_is_named_before_anything_runs(
    changes: dict[str, Any], error: type[Exception], message: str,
    pictures: Path, model_folder: Path, tmp_path: Path,
) -> None:  # fmt: skip
    with pytest.raises(error, match=message):
        search(config(pictures, model_folder, **changes), tmp_path / "run")


def test_shares_fall(pictures: Path, model_folder: Path) -> None:
    with pytest.raises(ValueError, match="shares must fall from rung to rung"):
        config(pictures, model_folder, shares=[0.5, 0.9])


def test_places_cost_the_same_at_all_rungs_or_each_has_its_own(
    pictures: Path, model_folder: Path
) -> None:
    with pytest.raises(ValueError, match="one number or one for each of the 2 shares, got 3"):
        config(pictures, model_folder, shares=[0.9, 0.5], place_cost=[0.1, 0.1, 0.1])
