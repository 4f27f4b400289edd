"""The rooms of the project and the doors between them."""

import ast
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("tocom", "adapters", "training", "server")
FOLDERS = (*PACKAGES, "benchmarks", "examples", "tests")

#: Lines of a file; files side by side, and in the rooms of the server.
LONGEST, MOST, MOST_IN_A_ROOM = 400, 20, 14

#: What each room, a folder or a file on its own, may import besides itself.
DOORS: dict[str, set[str]] = {
    "tocom": set(),
    "adapters": {"tocom"},
    "training": {"tocom", "adapters"},
    "server": {"tocom", "adapters"},
}

#: The same inside the server, floor by floor: a room may import those on lower floors.
FLOORS: tuple[set[str], ...] = (
    {"access_settings"},
    {"address", "errors", "progress", "settings", "schemas"},
    {"arguments", "engine", "int8"},
    {"models"},
    {"inference", "observe"},
    {"web"},
    {"v1", "oip", "banks", "page"},
    {"app", "offline"},
    {"process"},
    {"commands", "ray"},
    {"cli"},
)
#: Needs no torch and none of the server's other rooms.
CLIENT = {"client": {"schemas"}}


def sources(*folders: str) -> dict[str, str]:
    """Return the files of some folders, by their paths from the root."""
    paths = sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))
    return {path.relative_to(ROOT).as_posix(): path.read_text("utf-8") for path in paths}


def named(tree: ast.AST) -> Iterator[str]:
    """Yield the modules, and what may be modules, that a file imports anywhere in it."""
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=aliases):
                yield from (alias.name for alias in aliases)
            case ast.ImportFrom(module=str(module), level=0, names=aliases):
                yield from (f"{module}.{alias.name}" for alias in aliases)
            case ast.ImportFrom(level=int(level)) if level:
                raise AssertionError("imports are absolute here")
            case ast.Call(
                func=ast.Name(id="import_module") | ast.Attribute(attr="import_module"),
                args=[ast.Constant(value=str(module)), *_],
            ):
                yield module


def imports(files: Mapping[str, str]) -> dict[str, set[str]]:
    """Return which of the files each of them imports."""

    def file_of(name: str) -> str | None:
        while name:
            path = name.replace(".", "/")
            for candidate in (f"{path}.py", f"{path}/__init__.py"):
                if candidate in files:
                    return candidate
            name = name.rpartition(".")[0]  # a name that a module defines
        return None

    return {
        path: {found for name in named(ast.parse(text)) if (found := file_of(name))} - {path}
        for path, text in files.items()
    }


def circle(graph: Mapping[str, set[str]]) -> list[str]:
    """Return a circle of files that import each other; empty if there is none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def room(path: str) -> str:
    """Return the room within its package that a file is in: a folder, or the file by itself."""
    return path.split("/")[1].removesuffix(".py")


def wrong_doors(graph: Mapping[str, set[str]], doors: Mapping[str, set[str]]) -> set[str]:
    """Return the imports from one room of the server into another that may not be."""
    return {
        f"{path} -> {target}"
        for path, targets in graph.items()
        for target in targets
        if path.startswith("server/") and target.startswith("server/")
        if room(path) not in (room(target), "__init__")
        and room(target) not in doors.get(room(path), set())
    }


def server_doors() -> dict[str, set[str]]:
    below: set[str] = set()
    doors = {}
    for floor in FLOORS:
        doors |= {name: set(below) for name in floor}
        below |= floor
    return doors | CLIENT


def test_no_files_import_each_other():
    assert circle(imports(sources(*PACKAGES))) == []


def test_packages_import_one_way():
    wrong = {
        f"{path} -> {target}"
        for path, targets in imports(sources(*PACKAGES)).items()
        for target in targets
        if (package := path.split("/")[0]) != (other := target.split("/")[0])
        and other not in DOORS[package]
    }
    assert wrong == set()


def test_rooms_of_the_server_import_one_way():
    assert wrong_doors(imports(sources("server")), server_doors()) == set()


def test_every_room_of_the_server_has_its_floor():
    there = {room(path) for path in sources("server")} - {"__init__"}
    assert there == set(server_doors())


def test_no_file_is_too_long():
    lengths = {path: len(text.splitlines()) for path, text in sources(*FOLDERS).items()}
    assert {path: length for path, length in lengths.items() if length > LONGEST} == {}


def crowded(paths: list[str]) -> dict[str, int]:
    """Return the folders with too many files side by side."""
    count = Counter(path.rpartition("/")[0] for path in paths)
    return {
        folder: files
        for folder, files in count.items()
        if files > (MOST_IN_A_ROOM if folder.startswith("server") else MOST)
    }


def test_no_folder_is_crowded():
    assert crowded(list(sources(*FOLDERS))) == {}


def test_every_room_has_a_name():
    nameless = {"common", "helpers", "misc", "utils"}
    assert [
        path for path in sources(*FOLDERS) if nameless & {*Path(path).with_suffix("").parts}
    ] == []


def test_tests_mirror_the_rooms_of_the_server():
    rooms = {path.parent.name for path in (ROOT / "server").glob("*/__init__.py")}
    there = {path.parent.name for path in (ROOT / "tests" / "server").glob("*/test_*.py")}
    assert there == rooms


def test_the_readme_names_the_folders_that_there_are():
    where = (ROOT / "README.md").read_text("utf-8").partition("## Where things are")[2]
    there = {path.parts[0] for path in map(Path, sources(*FOLDERS))}
    assert sorted(re.findall(r"`(\w+)/`", where)) == sorted({*there, "docs", "deploy", "scripts"})


def test_a_page_lists_the_rooms_of_the_server():
    page = (ROOT / "docs/architecture.md").read_text("utf-8")
    listed = re.findall(r"^\| `(server/\w+)/` \|", page, re.MULTILINE)
    rooms = (ROOT / "server").glob("*/__init__.py")
    assert sorted(listed) == sorted(path.parent.relative_to(ROOT).as_posix() for path in rooms)


def test_what_a_page_says_to_open_is_there():
    page = (ROOT / "docs/architecture.md").read_text("utf-8").partition("## What to open first")[2]
    named = re.findall(r"`([\w/]+(?:/|\.py))`", page.partition("\n[")[0])
    assert len(named) > 10
    assert [path for path in named if not (ROOT / path).exists()] == []


def test_the_path_of_a_request_is_short_and_its_links_lead_somewhere():
    page = (ROOT / "docs" / "path-of-a-request.md").read_text("utf-8")
    assert 0 < len(re.findall(r"^\d+\. ", page, re.MULTILINE)) <= 12
    steps = re.split(r"^\d+\. ", page, flags=re.MULTILINE)[1:]
    for step in steps:
        links = re.findall(r"\[`(\w+)`\]\(\.\./([\w/.]+)\)", step)
        assert links
        for name, path in links:
            assert re.search(rf"\b(def|class) {name}\b", (ROOT / path).read_text("utf-8")), name


# What the tests above would say of a house that is not in order.


@pytest.mark.parametrize(
    "source",
    [
        "import server.app",
        "import torch, server.app as app",
        "from server.app import create_app",
        "from server import app",
        "def f():\n    from server import app",
        "if TYPE_CHECKING:\n    from server.app import create_app",
        "import importlib\nimportlib.import_module('server.app')",
    ],
)
def test_no_form_of_import_is_overlooked(source):
    files = {"server/__init__.py": "", "server/app.py": "", "server/web/a.py": source}
    assert "server/app.py" in imports(files)["server/web/a.py"]
    assert wrong_doors(imports(files), server_doors()) == {"server/web/a.py -> server/app.py"}


def test_a_circle_is_found():
    files = {
        "tocom/a.py": "from tocom.b import x",
        "tocom/b.py": "def f():\n    import tocom.c",
        "tocom/c.py": "from tocom import a",
        "tocom/d.py": "from tocom import a",
    }
    assert set(circle(imports(files))) == {"tocom/a.py", "tocom/b.py", "tocom/c.py"}


def test_rooms_on_one_floor_do_not_know_each_other():
    files = {"server/v1/a.py": "import server.oip.b", "server/oip/b.py": ""}
    assert wrong_doors(imports(files), server_doors()) == {"server/v1/a.py -> server/oip/b.py"}


def test_a_crowded_folder_is_found():
    assert crowded([f"server/v1/{i}.py" for i in range(15)]) == {"server/v1": 15}
    assert crowded([f"training/{i}.py" for i in range(20)]) == {}
