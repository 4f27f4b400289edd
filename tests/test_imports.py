"""The rooms of the project and the doors between them."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

#: package -> the packages of ours that it may import
MAY_IMPORT = {
    "tocom": set(),
    "adapters": {"tocom"},
    "training": {"adapters", "tocom"},
    "server": {"adapters", "tocom"},
}
FOLDERS = [*MAY_IMPORT, "benchmarks", "examples", "tests"]
LONGEST = 400


def sources(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def imported(tree: ast.AST) -> Iterator[str]:
    """Yield what a module imports from outside its package, wherever in it the import stands."""
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=aliases):
                yield from (alias.name for alias in aliases)
            case ast.ImportFrom(module=str(module), level=0):
                yield module
            case ast.Call(
                func=ast.Name(id="import_module") | ast.Attribute(attr="import_module"),
                args=[ast.Constant(value=str(module)), *_],
            ):
                yield module


def of_ours(source: str) -> set[str]:
    return {name.partition(".")[0] for name in imported(ast.parse(source))} & set(MAY_IMPORT)


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_imports_go_one_way(package):
    allowed = MAY_IMPORT[package] | {package}
    wrong = {
        str(path.relative_to(ROOT)): names
        for path in sources(package)
        if (names := of_ours(path.read_text("utf-8")) - allowed)
    }
    assert wrong == {}


@pytest.mark.parametrize(
    "source",
    [
        "import server",
        "import torch, server.app as app",
        "from server.app import create_app",
        "def f():\n    from server import app",
        "import importlib\nimportlib.import_module('server.app')",
    ],
)
def test_no_form_of_import_is_overlooked(source):
    assert of_ours(source) == {"server"}


def test_relative_imports_stay_inside():
    assert of_ours("from .server import app") == set()


def test_no_file_is_too_long():
    lengths = {
        str(path.relative_to(ROOT)): len(path.read_text("utf-8").splitlines())
        for path in sources(*FOLDERS)
    }
    assert {path: length for path, length in lengths.items() if length > LONGEST} == {}


def test_every_room_has_a_name():
    assert [path for path in sources(*FOLDERS) if path.stem in {"helpers", "misc", "utils"}] == []
