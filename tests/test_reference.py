"""The pages of docs/reference are current, and leave nothing out."""

import re
from typing import Literal

import pytest
from pydantic import BaseModel, Field, SecretStr

from scripts import reference
from server.settings import ApiKey, ModelSettings, Settings
from tests.test_docs import RECIPES


@pytest.mark.parametrize("name", reference.PAGES)
def test_a_page_says_what_the_code_says(name: str):
    path = reference.FOLDER / f"{name}.md"
    there = path.read_text("utf-8") if path.exists() else ""
    assert there == reference.PAGES[name](), (
        f"docs/reference/{name}.md is out of date: `make reference` writes it anew"
    )


def rows(page: str) -> dict[str, list[str]]:
    """Return the first cells of the rows below each heading of a page."""
    text = (reference.FOLDER / f"{page}.md").read_text("utf-8")
    parts = re.split(r"^#+ (.+)\n", text, flags=re.MULTILINE)[1:]
    return {
        heading: re.findall(r"^\| `([^`]+)`", part, re.MULTILINE)
        for heading, part in zip(parts[::2], parts[1::2], strict=True)
    }


def test_every_setting_is_there():
    found = rows("settings")
    assert found["Settings of the server"] == [*Settings.model_fields]
    assert found["Model"] == [*ModelSettings.model_fields]
    assert found["ApiKey"] == [*ApiKey.model_fields]
    assert "| `max_batch` | `TOCOM_MAX_BATCH` |" in reference.settings_page()


@pytest.mark.parametrize("command", RECIPES)
def test_every_key_of_a_recipe_is_there(command: str):
    assert rows("recipes")[f"tocom-train {command}"] == [*RECIPES[command].model_fields]


@pytest.mark.parametrize("page", ["settings", "recipes"])
def test_every_field_says_what_it_means(page: str):
    text = reference.PAGES[page]()
    parts = re.split(r"^#+ (.+)\n", text, flags=re.MULTILINE)[1:]
    silent = [
        f"{heading}: {key}"
        for heading, part in zip(parts[::2], parts[1::2], strict=True)
        for key in re.findall(r"^\| `([^`]+)` .*\|  \|$", part, re.MULTILINE)
    ]
    assert not silent, "these fields have no description"


def test_links_between_tables_lead_to_one():
    text = (reference.FOLDER / "recipes.md").read_text("utf-8")
    headings = {heading.lower().replace(" ", "-") for heading in rows("recipes")}
    assert {*re.findall(r"\(#([^)]+)\)", text)} <= headings


class Inner(BaseModel):
    """What is within.

    No more of this.
    """

    x: int = 1


class Outer(BaseModel):
    """`tocom-train outer`: of all kinds."""

    a: int = Field(ge=1, lt=9, description="a | b")
    b: Literal["x", "y", "z"] | None = None
    c: tuple[float, ...] = Field((0.5,), min_length=1)
    d: dict[str, bool | int | float | str] = {}
    e: Inner = Inner()
    f: Inner = Inner(x=2)
    g: list[Inner] = []
    h: tuple[int, str] = (1, "a")
    i: SecretStr | None = None
    j_bytes: int = 2**21
    k: str = Field("a", pattern="^a|b$")


def test_all_kinds_of_keys_have_words():
    tables = reference.Tables([Outer])
    assert tables.keys(Outer).splitlines()[2:] == [
        r"| `a` | integer (≥ 1, < 9) | required | a \| b |",
        "| `b` | `x`, `y` or `z` | none |  |",
        "| `c` | list of number (at least 1) | `[0.5]` |  |",
        "| `d` | table of true/false, number or text | `{}` |  |",
        "| `e` | [Inner](#inner) | its own | What is within. |",
        '| `f` | [Inner](#inner) | `{"x": 2}` | What is within. |',
        "| `g` | list of [Inner](#inner) | `[]` |  |",
        '| `h` | list of integer, text | `[1, "a"]` |  |',
        "| `i` | secret | none |  |",
        "| `j_bytes` | integer | `2097152` (2 MiB) |  |",
        r"| `k` | text like `^a\|b$` | `a` |  |",
    ]
    heading, what, table = tables.sections()
    assert (heading, what) == ("## Inner", "What is within.")
    assert table.endswith("| `x` | integer | `1` |  |")
