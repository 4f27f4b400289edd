"""What pyproject.toml says about the project is so."""

import importlib
import re
import shutil
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
TOP_LEVEL = ("adapters", "server", "tocom", "training")
PACKAGES = sorted(
    ".".join(init.parent.relative_to(ROOT).parts)
    for name in TOP_LEVEL
    for init in (ROOT / name).rglob("__init__.py")
)
SCRIPTS = PYPROJECT["project"]["scripts"]
SAMPLES = ROOT / "tocom" / "bundled" / "samples"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> set[str]:
    """What a wheel of this tree holds, without its metadata."""
    built = tmp_path_factory.mktemp("wheel")
    tree = built / "tree"
    # A copy: setuptools builds beside its sources, and would pack what an old build has left.
    shutil.copytree(
        ROOT, tree, ignore=shutil.ignore_patterns(".*", "build", "dist", "docs", "tests", "runs")
    )
    build = "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])"
    done = subprocess.run(
        [sys.executable, "-c", build, str(built)],
        cwd=tree,
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    (path,) = built.glob("*.whl")
    with ZipFile(path) as archive:
        return {name for name in archive.namelist() if ".dist-info/" not in name}


def test_the_wheel_holds_the_packages_of_the_tree(wheel):
    listed = subprocess.run(
        ["git", "ls-files", "--", *TOP_LEVEL], cwd=ROOT, check=False, capture_output=True, text=True
    )
    if listed.returncode:
        pytest.skip("the tree is no git checkout: what belongs to it is not known")
    assert wheel == set(listed.stdout.splitlines())


@pytest.mark.parametrize("name", TOP_LEVEL)
def test_packages_are_typed(name):
    assert (ROOT / name / "py.typed").exists()


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


@pytest.mark.parametrize(
    "page", ["README.md", "deploy/kserve.yaml", "deploy/kubernetes.yaml", "docs/operating.md"]
)
def test_images_and_wheels_are_of_this_version(page):
    named = re.findall(r"tocom[-_]serve[:-](\d[\w.]*)", (ROOT / page).read_text("utf-8"))
    assert {*named} == {PYPROJECT["project"]["version"]}


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
