"""The documentation is true: programs run, commands are accepted, tables are current."""

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import adapters.cli
import server.arguments
from adapters import export_model
from server.app import create_app
from server.settings import ApiKey, ModelSettings, Settings
from tests.adapters.test_export import small_backbone
from training.analysis.config import AnalyseConfig
from training.cli import _parser
from training.config import (
    DistillConfig,
    FinetuneConfig,
)
from training.evaluate import table
from training.ladders.compare_config import CompareConfig
from training.ladders.search_config import LadderSearchConfig
from training.measuring_config import CalibrateConfig, EvaluateConfig
from training.presets import read_recipe
from training.prune.config import PruneConfig
from training.segment.config import EvaluateSegmentConfig, SegmentConfig
from training.vtab.config import VtabConfig

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
RECIPES = {
    "distill": DistillConfig,
    "finetune": FinetuneConfig,
    "prune": PruneConfig,
    "evaluate": EvaluateConfig,
    "calibrate": CalibrateConfig,
    "vtab": VtabConfig,
    "search": LadderSearchConfig,
    "compare": CompareConfig,
    "segment": SegmentConfig,
    "evaluate-segment": EvaluateSegmentConfig,
    "analyse": AnalyseConfig,
}


#: What an example calls `images` is what timm makes of the picture.
AS_TIMM = """
from timm.data import create_transform
same = create_transform(**wanted, is_training=False)(Image.open("tocom/bundled/samples/cup.jpg"))
np.testing.assert_allclose(images[0], same.numpy(), atol=1e-5)
"""


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


def commands(program: str) -> list[list[str]]:
    """Every call of a program in the pages, as its arguments."""
    found = []
    for page in PAGES:
        for block in blocks(page, "sh"):
            for line in lines(block):
                words = shlex.split(line, comments=True)
                while words and re.match(r"[A-Z_]+=", words[0]):
                    del words[0]  # a variable of the call
                if words and words[0] == program:
                    found.append(words[1:])
    return found


def lines(block: str) -> list[str]:
    return block.replace("\\\n", " ").splitlines()


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "python")], ids=lambda p: p.stem)
@pytest.mark.filterwarnings("default")  # as the reader's process has them
def test_python_examples_run(
    page: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    for block in blocks(page, "python"):
        if "localhost:8000" in block:
            block = block.replace("localhost:8000", request.getfixturevalue("address"))
        if "imagenet-2" in block:
            block = block.replace("imagenet-2", str(request.getfixturevalue("exported")))
            block += AS_TIMM
        exec(compile(block, page.name, "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize("arguments", commands("tocom-train"), ids=" ".join)
def test_training_commands_are_accepted(arguments: list[str]) -> None:
    # A ladder is read with its recipe; the page's is the one that it searches just before.
    given = [re.sub(r"^ladder=runs/.*", "ladder=tome", each) for each in arguments]
    parsed = _parser().parse_args(given)
    if kind := RECIPES.get(arguments[0]):  # attach takes no recipe
        read_recipe(kind, parsed.recipe, parsed.overrides)


@pytest.mark.parametrize("command", commands("tocom-serve"), ids=" ".join)
def test_serving_commands_are_accepted(command: list[str]) -> None:
    if "--config" in command:  # its file is the reader's
        assert server.arguments.parser().parse_args(command).config
    else:
        assert server.arguments.settings(server.arguments.parser().parse_args(command))


def flags(parser: argparse.ArgumentParser) -> set[str]:
    """All that a parser and its commands know."""
    found = set()
    for action in parser._actions:
        found |= {*action.option_strings}
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                found |= flags(command)
    return found


PROGRAMS = {
    "tocom-bank": adapters.cli._parser,
    "tocom-serve": server.arguments.parser,
    "tocom-train": _parser,
}


@pytest.mark.parametrize("program", PROGRAMS)
def test_flags_in_the_text_exist(program: str) -> None:
    known = flags(PROGRAMS[program]())
    for page in PAGES:
        for said in re.findall(rf"`{program} ([^`]*)`", page.read_text()):
            asked = {word.partition("=")[0] for word in said.split() if word.startswith("--")}
            assert asked <= known, f"{page.name}: {program} {said}"


@pytest.mark.parametrize("shell", ["bash", "zsh"])
@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "sh")], ids=lambda p: p.stem)
def test_shell_blocks_can_be_copied(page: Path, shell: str) -> None:
    if not shutil.which(shell):
        pytest.skip(f"needs {shell}")
    for block in blocks(page, "sh"):
        done = subprocess.run(
            [shell, "-n"], input=block, capture_output=True, text=True, check=False
        )
        assert not done.stderr, block


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "sh")], ids=lambda p: p.stem)
def test_shell_blocks_are_alike_in_all_shells(page: Path) -> None:
    for block in blocks(page, "sh"):
        for line in lines(block):
            assert not line.startswith("$ "), line
            bare = re.sub(r"'[^']*'|\"[^\"]*\"", "", line)
            # zsh looks for files where one of these is not quoted, and fails without any.
            assert not re.search(r"[\[\]?]|<\(", bare), line


def test_prompts_are_only_where_output_is_shown() -> None:
    for page in PAGES[1:]:
        for block in blocks(page, "console"):
            assert any(not line.startswith("$ ") for line in block.splitlines()), block


def test_bank_commands_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOCOM_STORE", str(tmp_path / "store"))
    bundled = ROOT / "tocom" / "bundled" / "deit_tiny_bank"
    name = json.loads((bundled / "bank.json").read_text())["name"]
    found = commands("tocom-bank")
    assert {arguments[0] for arguments in found} >= {
        "inspect",
        "publish",
        "list",
        "verify",
        "delete",
    }
    for arguments in found:
        adapters.cli._parser().parse_args(arguments)
        if arguments[0] == "export-model":  # a minute's work, done on small models elsewhere
            continue
        if arguments[0] == "push" or arguments[1:2] == ["hf://my-org/my-bank"]:
            continue  # there is no network
        mine = [
            a.replace("runs/my-bank/bank", str(bundled)).replace("my-bank", name) for a in arguments
        ]
        assert adapters.cli.main(mine) == 0, mine


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model in both formats, named without its suffixes."""
    path = tmp_path_factory.mktemp("exported") / "small"
    backbone = small_backbone(class_names=tuple("abcdefghij"))
    for suffix in (".onnx", ".xml"):
        export_model(backbone, 2, path.with_suffix(suffix))
    return path


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """The server that the README starts with a task beside the bundled model, on a free port."""
    starts = [block for block in blocks(ROOT / "README.md", "sh") if "task=bundled:" in block]
    _, *arguments = shlex.split(starts[0].replace("\\\n", " "))
    settings = {"TOCOM_PORT": "0", "TOCOM_MAX_BATCH": "1", "TOCOM_MAX_GRAPHS": "0"}
    environment = os.environ | settings | {"HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "server.cli", *arguments]
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        greeting = ""
        while "try it" not in greeting:
            line = process.stdout.readline()
            assert line, "the server ended"
            greeting += line
        yield re.findall(r"http://(127\.0\.0\.1:\d+)", greeting)[0]
        process.terminate()
        assert process.wait(timeout=60) == 0


def curl_lines() -> list[str]:
    """Every call of a server that wants nothing of the reader's: a photo, a bank, a key."""
    return [
        line.removeprefix("$ ")
        for page in PAGES
        for block in blocks(page, "console") + blocks(page, "sh")
        for line in lines(block)
        if "curl " in line and "localhost:8000" in line
        if not re.search("@photo.jpg|model=flowers|ADMIN_KEY", line)
    ]


@pytest.mark.parametrize("line", curl_lines())
def test_curl_examples_answer(line: str, address: str) -> None:
    done = subprocess.run(
        ["bash", "-c", line.replace("localhost:8000", address).replace("curl ", "curl --fail ")],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any]
    answer, *_ = map(json.loads, done.stdout.splitlines())
    if "cup.jpg" in line:
        assert answer["predictions"][0]["label"] == "espresso"
        assert answer["rate"] == 2 or "rate=2" not in line
    if "cat.jpg" in line:
        assert answer["predictions"][0]["label"] == "Egyptian cat"
        assert not answer["compensate"] or "compensate=false" not in line
    if "textures" in line:
        assert (answer["model"], answer["compensate"]) == ("textures", True)


def test_every_setting_and_route_is_in_the_guides() -> None:
    guides = "\n".join(page.read_text() for page in PAGES)
    for name in (*Settings.model_fields, *ModelSettings.model_fields, *ApiKey.model_fields):
        assert f"`{name}`" in guides or f"{name} = " in guides, name
    for path in create_app(Settings()).openapi()["paths"]:
        # Guides write what is to be filled in as a word in capitals: /v1/models/NAME.
        assert re.sub(r"{(\w+)}", lambda name: name[1].upper(), path) in guides, path


def test_readme_says_what_was_measured() -> None:
    result = json.loads((ROOT / "docs/results/deit_tiny_half/evaluation.json").read_text())
    rows = table(result, (0, 1, 2, 3, 4))
    assert rows in (ROOT / "docs/results.md").read_text()
    # Plain and with the bank, at rates 0, 2 and 4: all, three quarters and half of the compute.
    top1 = [row.split(" | ")[4].split(" / ")[-1] for row in rows.splitlines()[-5:]]
    stock, quarters, half = (float(top1[rate]) for rate in (0, 2, 4))
    said = (
        f"{stock - quarters:.1f} points of top-1 at three quarters of the compute and "
        f"{stock - half:.1f} points at half."
    )
    assert said in " ".join((ROOT / "README.md").read_text().split())
