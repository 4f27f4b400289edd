import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from adapters import open_bank
from adapters.cascade import (
    Cascade,
    CascadePoint,
    frontier,
    margins,
    read_cascade,
    write_cascade,
)
from adapters.ladder import digest
from tocom import TOME, ConfigError, bundled_folder

POINTS = (
    CascadePoint(rates=(4,), thresholds=(), agreement=0.92, share=0.5),
    CascadePoint(rates=(4, 0), thresholds=(0.5,), agreement=0.97, share=0.6),
    CascadePoint(rates=(4, 2, 0), thresholds=(0.9, 0.3), agreement=0.99, share=0.75),
    CascadePoint(rates=(0,), thresholds=(), agreement=1.0, share=1.0),
)
CASCADE = Cascade(
    weights_digest="a" * 64,
    bank_digest="b" * 64,
    ladder_digest=digest(TOME),
    source=0,
    points=POINTS,
    pictures={"count": 100},
)


def test_a_file_says_all(tmp_path: Path) -> None:
    path = write_cascade(CASCADE, tmp_path / "cascade.json")
    assert read_cascade(path) == CASCADE
    assert read_cascade(tmp_path) == CASCADE


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 2}, "format_version: Input should be 1"),
        ({"new": 1}, "new: Extra inputs are not permitted"),
        ({"points": []}, "points: Tuple should have at least 1 item"),
        ({"points": [POINTS[1].model_dump(), POINTS[0].model_dump()]}, "its points must rise"),
        ({"source": -1}, "source: Input should be greater than or equal to 0"),
    ],
)
def test_a_faulty_file_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "cascade.json"
    path.write_text(json.dumps(CASCADE.model_dump(mode="json") | changes))
    with pytest.raises(ConfigError, match=f"is no cascade: .*{re.escape(message)}"):
        read_cascade(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rates": [0, 4]}, r"the rates must fall, each run dearer than the last, got \(0, 4\)"),
        ({"thresholds": []}, "2 rates have 1 thresholds between them, got 0"),
        ({"thresholds": [-1]}, "greater than or equal to 0"),
        ({"thresholds": [float("nan")]}, "finite number"),
        ({"agreement": 1.1}, "less than or equal to 1"),
    ],
)
def test_a_faulty_point_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CascadePoint(**(POINTS[1].model_dump() | changes))


def test_what_is_no_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read the cascade .*: No such file"):
        read_cascade(tmp_path)


def test_the_cheapest_that_agrees_and_the_best_that_is_within() -> None:
    assert CASCADE.agreeing(0.9) == POINTS[0]
    assert CASCADE.agreeing(0.97) == POINTS[1]
    assert CASCADE.agreeing(0.991) == POINTS[3]
    assert CASCADE.within(0.74) == POINTS[1]
    assert CASCADE.within(0.4) is None


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("a" * 64, "", "b" * 64, TOME, 0), None),
        (("c" * 64, "", "b" * 64, TOME, 0), f"weights {'a' * 12}, served is {'c' * 12}"),
        (("a" * 64, "d" * 64, "b" * 64, TOME, 0), f"task none, served is {'d' * 12}"),
        (("a" * 64, "", None, TOME, 0), f"bank {'b' * 12}, served is none"),
        (("a" * 64, "", "b" * 64, TOME, 3), "source rate 0, served is 3"),
    ],
)
def test_it_is_for_one_model_with_one_bank(given: Any, said: str | None) -> None:
    assert CASCADE.misfit(*given) == said


def test_margins_are_leads_of_the_best_class() -> None:
    logits = torch.tensor([[0.1, 0.7, 0.2], [0.4, 0.4, 0.2]]).log()
    assert margins(logits).tolist() == pytest.approx([0.5, 0.0])
    assert margins(logits[0]).item() == pytest.approx(0.5)
    assert margins(torch.zeros(2, 1)).tolist() == [1.0, 1.0]


def test_the_bundled_one_is_for_the_bundled_model_with_its_bank() -> None:
    bank = open_bank("bundled:deit_tiny_bank")
    cascade = read_cascade(bundled_folder("deit_tiny"))
    digests = bank.info.backbone.digest, "", bank.info.digest
    assert cascade.misfit(*digests, bank.ladder, 0) is None
    assert cascade.agreeing(0.99) is not None


def test_the_frontier_leaves_out_what_is_worse_and_dearer() -> None:
    worse = CascadePoint(rates=(3, 0), thresholds=(0.5,), agreement=0.96, share=0.7)
    assert frontier([worse, *reversed(POINTS)]) == POINTS
