"""Measuring in several processes."""

import json
from pathlib import Path

import pytest

from tests.training.jobs import in_two_processes
from training.evaluate import evaluate
from training.measuring_config import EvaluateConfig


def test_processes_share_out_the_pictures(
    pictures: Path, model_folder: Path, tmp_path: Path
) -> None:
    asked = {"batch_size": 7, "workers": 0, "limit": 23, "sources": [0, 3], "max_rate": 4}
    said = {"backbone": {"name": str(model_folder)}, "pictures": str(pictures), **asked}
    one = json.loads(evaluate(EvaluateConfig.model_validate(said), tmp_path / "one").read_text())
    in_two_processes(
        "evaluate", "every-rate", f"backbone.name={model_folder}", f"pictures={pictures}",
        *(f"{key}={value}" for key, value in asked.items()), "--folder", str(tmp_path / "two"),
    )  # fmt: skip
    two = json.loads((tmp_path / "two" / "evaluation.json").read_text())
    rows = one.pop("rows"), two.pop("rows")
    assert one == two
    for alone, together in zip(*rows, strict=True):
        assert alone.pop("plain") == pytest.approx(together.pop("plain"), abs=1e-4)
        assert alone == together
    parts = [
        json.loads((tmp_path / "two" / f"progress-{number}-of-2.json").read_text())["done"]
        for number in (1, 2)
    ]
    assert parts == [12, 11]
