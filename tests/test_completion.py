"""What shells offer while a command of ours is typed."""

import shutil
import subprocess
from collections.abc import Callable

import pytest

import adapters.cli
import server.arguments
import training.cli
from tocom.command_line import Parser
from tocom.completion import SHELLS, script

PROGRAMS: dict[str, Callable[[], Parser]] = {
    "tocom-bank": adapters.cli._parser,
    "tocom-serve": server.arguments.parser,
    "tocom-train": training.cli._parser,
}

# Each of them tells what it offers for the last of the words that it is given.
ASK = {
    "bash": """
        COMP_WORDS=("$@") COMP_CWORD=$(($# - 1))
        _{name}
        printf '%s\\n' "${{COMPREPLY[@]}}"
    """,
    "fish": """
        complete -C "$argv" | string replace -r '\\t.*' ''
    """,
    "zsh": """
        compadd() {{ print -l -- ${{(M)offered:#$current*}} }}
        words=("$@") CURRENT=$#
        _{name}
    """,
}


def offered(shell: str, line: str) -> set[str]:
    """Return what a shell offers for the last word of a line, which may be empty."""
    if not shutil.which(shell):
        pytest.skip(f"needs {shell}")
    words = line.split(" ")
    program = words[0]
    before = "compdef() { }\n" if shell == "zsh" else ""
    text = before + script(PROGRAMS[program](), shell)
    text += ASK[shell].format(name=program.replace("-", "_"))
    bare = {"bash": ["--norc"], "fish": ["--no-config"], "zsh": ["-f"]}[shell]
    given = [line] if shell == "fish" else [shell, *words]
    done = subprocess.run(
        [shell, *bare, "-c", text, *given], capture_output=True, text=True, check=False
    )
    assert not done.stderr
    return {*done.stdout.split()}


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("tocom-serve c", {"check", "classify"}),
        ("tocom-serve --max-b", {"--max-body-bytes", "--max-batch", "--max-bank-bytes"}),
        ("tocom-serve --warmup ", {"all", "first", "none"}),
        ("tocom-serve --port 9000 --no-o", {"--no-otel"}),
        ("tocom-serve --top-k 3 classify --js", {"--json"}),
        ("tocom-train ev", {"evaluate", "evaluate-segment"}),
        ("tocom-train vtab vt", {"vtab1k"}),
        ("tocom-train finetune deit-tiny-task --method l", {"linear", "lora"}),
        ("tocom-train presets show meth", {"methods"}),
        ("tocom-bank ex", {"export", "export-model"}),
        ("tocom-bank push a --priv", {"--private"}),
        ("tocom-bank --completion z", {"zsh"}),
    ],
)
def test_what_may_follow_is_offered(shell, line, expected):
    assert offered(shell, line) == expected


@pytest.mark.parametrize("shell", ["bash", "zsh"])  # fish itself adds the files
@pytest.mark.parametrize(
    "line", ["tocom-serve --config c", "tocom-serve classify c", "tocom-train attach e"]
)
def test_elsewhere_it_is_left_to_the_shell_which_offers_files(shell, line):
    assert offered(shell, line) == set()


def test_a_help_may_hold_quotes():
    parser = Parser(prog="p")
    parser.add_argument("--a", help="the bank's, 9 %% of it")
    assert "-d 'the bank\\'s, 9 % of it'" in script(parser, "fish")
