"""What pyproject.toml says about the project is so."""

import importlib
import re
import sys
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
PACKAGES = PYPROJECT["tool"]["setuptools"]["packages"]
SCRIPTS = PYPROJECT["project"]["scripts"]
SAMPLES = ROOT / "tocom" / "bundled" / "samples"


def test_every_package_is_listed():
    top_level = {name.partition(".")[0] for name in PACKAGES}
    found = {
        ".".join(init.parent.relative_to(ROOT).parts)
        for name in top_level
        for init in (ROOT / name).rglob("__init__.py")
    }
    assert sorted(PACKAGES) == sorted(found)


@pytest.mark.parametrize("name", PACKAGES)
def test_packages_are_typed(name):
    assert (ROOT / name.partition(".")[0] / "py.typed").exists()


@pytest.mark.parametrize("script", SCRIPTS)
def test_console_programs_resolve(script):
    module, _, function = SCRIPTS[script].partition(":")
    assert callable(getattr(importlib.import_module(module), function))


@pytest.mark.parametrize("name", PACKAGES)
def test_public_names_are_sorted_and_exist(name):
    package = importlib.import_module(name)
    names = getattr(package, "__all__", [])
    assert names == sorted(set(names))
    assert [public for public in names if not hasattr(package, public)] == []


def test_the_changelog_starts_with_this_version():
    heading = re.search(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.MULTILINE)
    assert heading is not None
    assert heading[1] == PYPROJECT["project"]["version"]


def test_every_sample_photograph_has_its_licence():
    listed = re.findall(
        r"^\| `(.+?)` \|", (SAMPLES / "LICENSES.md").read_text("utf-8"), re.MULTILINE
    )
    photographs = sorted(path.name for path in SAMPLES.glob("*.jpg"))
    assert len(photographs) >= 6
    assert sorted(listed) == photographs


@pytest.mark.parametrize("page", ["Dockerfile", "docs/operating.md"])
def test_images_are_built_with_extras_that_there_are(page):
    named = re.findall(r"EXTRAS=(\w\S*)", (ROOT / page).read_text("utf-8"))
    assert named
    there = PYPROJECT["project"]["optional-dependencies"].keys()
    assert {extra for names in named for extra in names.split(",")} <= there
