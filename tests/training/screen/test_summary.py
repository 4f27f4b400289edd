import json
from pathlib import Path
from typing import Any

from training.screen.summary import aligned, summary


def written(folder: Path, watched: dict[int, dict[str, Any]], steps: int = 20) -> Path:
    lines = [
        {"step": step, "loss": 1.0 / step, "learning_rate": 0.1, "seconds": 30.0}
        | watched.get(step, {})
        for step in range(1, steps + 1)
    ]
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return folder


def test_a_bank_is_compared_with_plain_merging(tmp_path: Path) -> None:
    at_10 = {"unseen_kl_4_plain": 0.5, "unseen_kl_4_bank": 0.4}
    at_20 = {"unseen_kl_4_plain": 0.5, "unseen_kl_4_bank": 0.25}
    assert summary(written(tmp_path, {10: at_10, 20: at_20})).splitlines() == [
        "20 steps in 10 min: loss 0.750 to 0.0513 (means of 2 steps)",
        "| unseen KL at rate | plain | step 10 | step 20 | change |",
        "| ----------------- | ----- | ------- | ------- | ------ |",
        "| 4                 | 0.500 | 0.400   | 0.250   | -50 %  |",
        f"all of it is in {tmp_path}",
    ]


def test_without_plain_figures_the_first_ones_are_compared_with(tmp_path: Path) -> None:
    at_2 = {"unseen_kl_0": 0.0, "unseen_kl_8": 0.5}
    at_4 = {"unseen_kl_0": 0.01, "unseen_kl_8": 0.4}
    said = summary(written(tmp_path, {2: at_2, 4: at_4}, steps=4))
    assert "| unseen KL at rate | step 2 | step 4 | change |" in said
    assert "| 0                 | 0.00   | 0.0100 |        |" in said
    assert "| 8                 | 0.500  | 0.400  | -20 %  |" in said


def test_a_run_that_measured_nothing_has_its_loss(tmp_path: Path) -> None:
    assert summary(written(tmp_path, {}, steps=2)).splitlines() == [
        "2 steps in 1 min: loss 1.00 to 0.500",
        f"all of it is in {tmp_path}",
    ]
    (tmp_path / "metrics.jsonl").unlink()
    assert summary(tmp_path) == f"done, in {tmp_path}"


def test_columns_of_a_table_have_one_width_and_the_rest_stays() -> None:
    text = "# A title\n\n| a | long name |\n|---|---|\n| 10 |  |\n\nMore: a | b"
    assert aligned(text).splitlines() == [
        "# A title",
        "",
        "| a   | long name |",
        "| --- | --------- |",
        "| 10  |           |",
        "",
        "More: a | b",
    ]
