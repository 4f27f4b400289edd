"""The site of docs/ can be built, and all its links lead somewhere."""

import logging
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

from scripts.site_links import without_links

ROOT = Path(__file__).parents[1]


@pytest.mark.skipif(find_spec("material") is None, reason="mkdocs-material is not installed")
def test_the_site_is_built_without_a_warning(tmp_path: Path):
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "index.html").exists()


def test_every_page_is_in_the_navigation():
    """Also told where mkdocs is not installed."""
    nav = yaml.safe_dump(yaml.safe_load((ROOT / "mkdocs.yml").read_text("utf-8"))["nav"])
    docs = ROOT / "docs"
    pages = {path.relative_to(docs).as_posix() for path in docs.rglob("*.md")}
    assert {*re.findall(r"[\w/-]+\.md", nav)} == {
        page for page in pages if not page.startswith("results/")
    }


@pytest.mark.parametrize(
    ("page", "text", "becomes"),
    [
        ("a.md", "see [`cost`](../tocom/cost.py).", "see `cost` (`tocom/cost.py`)."),
        ("decisions/a.md", "[x](../../README.md#b)", "x (`README.md`)"),
        ("a.md", "[results/](results)", "results/ (`docs/results`)"),
        ("a.md", "[`tocom/cost.py`](../tocom/cost.py)", "`tocom/cost.py`"),
        ("a.md", "[the API](api.md#errors)", "[the API](api.md#errors)"),
        ("decisions/a.md", "[b](../benchmarks.md)", "[b](../benchmarks.md)"),
        ("a.md", "[b](https://example.org/a) [c](#c)", "[b](https://example.org/a) [c](#c)"),
        ("a.md", "![a plot](results/burst/elastic.svg)", "![a plot](results/burst/elastic.svg)"),
    ],
)
def test_links_into_the_code_are_told_as_paths(page: str, text: str, becomes: str):
    assert without_links(text, page) == becomes


def test_a_link_into_the_code_that_leads_nowhere_is_a_warning(caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING):
        without_links("[`gone`](../server/gone.py)", "a.md")
    assert caplog.messages == ["docs/a.md has a link to ../server/gone.py, which does not exist"]


def test_the_glossary_is_short():
    text = (ROOT / "docs" / "glossary.md").read_text("utf-8")
    words = re.findall(r"^\*\*(.+?)\.\*\* ((?:.+\n)+)", text, re.MULTILINE)
    assert 0 < len(words) <= 18
    for word, meaning in words:
        assert len(re.findall(r"\.(?=\s)", meaning)) == 2, word
