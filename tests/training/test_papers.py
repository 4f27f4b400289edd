"""The page that compares the presets with the papers says what the presets have."""

import re
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.training.test_config import DISTILL, KINDS
from training.presets import read_recipe

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PAGE = Path(__file__).parents[2] / "docs" / "papers.md"
ROWS = re.findall(
    r"^\| `([\w-]+)` \| ([^|]+) \|[^|]+\| `([\w.]+)=([^`]+)` \|", PAGE.read_text(), re.M
)


@pytest.mark.parametrize(("preset", "what", "key", "text"), ROWS)
def test_a_row_says_what_the_preset_has(preset: str, what: str, key: str, text: str) -> None:
    kind, overrides = KINDS.get(preset, DISTILL)
    value: Any = read_recipe(kind, preset, overrides).model_dump(mode="json")
    for part in key.split("."):
        value = value[int(part)] if part.isdigit() else value.get(part)
    assert value == tomllib.loads(f"value = {text}")["value"], what


def test_every_row_is_read() -> None:
    rows = [line for line in PAGE.read_text().splitlines() if line.startswith("| `")]
    assert len(rows) == len(ROWS) > 60


def test_presets_that_share_their_values_do() -> None:
    kind, overrides = DISTILL
    base, *others = (
        read_recipe(kind, f"imagenet-{name}", overrides).model_dump(exclude={"name", "backbone"})
        for name in ("deit-b", "deit-s", "deit-ti", "deit-b-384", "mae-vit-b")
    )
    assert others[:3] == [base] * 3
    assert others[3] == base | {"proportional": False, "features": 1.0}
