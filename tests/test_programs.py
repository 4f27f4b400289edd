"""All programs: what they tell of themselves, and of mistakes, without importing torch."""

import json
import re
import socket
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.test_packaging import PYPROJECT, SCRIPTS

ROOT = Path(__file__).parents[1]

#: Runs the commands that it reads, and says of each what came of it.
PROGRAM = """if True:
    import io
    import json
    import sys
    from contextlib import redirect_stderr, redirect_stdout
    from importlib import import_module

    main = getattr(import_module(sys.argv[1]), "main")
    heavy = {"torch", "timm", "openvino", "transformers", "accelerate", "matplotlib"}
    answers = []
    for arguments in json.load(sys.stdin):
        said, complaint = io.StringIO(), io.StringIO()
        with redirect_stdout(said), redirect_stderr(complaint):
            try:
                code = main(arguments)
            except SystemExit as end:
                code = end.code
        loaded = sorted(heavy & {*sys.modules})
        answers.append((code, said.getvalue(), complaint.getvalue(), loaded))
    json.dump(answers, sys.stdout)
"""

#: Commands with a mistake in them, and what is said of it.
MISTAKES = {
    "tocom-serve --prot 9000": "there is no option --prot, did you mean --port?",
    "tocom-serve chekc": "argument COMMAND: there is no 'chekc', did you mean check? There",
    "tocom-bank inspect x --jsn": "there is no option --jsn, did you mean --json?",
    "tocom-bank polish": "argument COMMAND: there is no 'polish', did you mean publish? ",
    "tocom-bank --completion sh": "there is no 'sh', did you mean ",
    "tocom-bank xyz": "argument COMMAND: there is no 'xyz'; there are: inspect, list, ",
    "tocom-train distill x --floder y": "no option --floder, did you mean --folder?",
    "tocom-train evaluate x --method lora": "evaluate: there is no option --method",
    "tocom-train evaluate evry-rate": "preset 'evry-rate', did you mean every-rate? (tocom-",
    "tocom-train evaluate every-rate bank": "an override is key=value, got 'bank'",
}


class Answer(NamedTuple):
    """What came of a command: its code, what it said, and what it imported that takes seconds."""

    code: int
    said: str
    complaint: str
    loaded: list[str]


def run(program: str, *commands: str) -> list[Answer]:
    """Run commands of a program, in a process that has done nothing else."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, SCRIPTS[program].partition(":")[0]],
        input=json.dumps([command.split() for command in commands]),
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [Answer(*answer) for answer in json.loads(done.stdout)]


@cache
def answers(program: str) -> dict[str, Answer]:
    """Return what comes of each command of a program; a process for each would take minutes."""
    commands = ["--help", "--version", "--completion bash"]
    for command in MISTAKES:
        name, _, arguments = command.partition(" ")
        if name == program:
            commands.append(arguments)
    return dict(zip(commands, run(program, *commands), strict=True))


@pytest.mark.parametrize("program", SCRIPTS)
def test_help_and_version_are_quick(program):
    code, said, _, loaded = answers(program)["--help"]
    assert (code, loaded) == (0, [])
    assert re.match(rf"usage: {program} ", said)
    version = PYPROJECT["project"]["version"]
    assert answers(program)["--version"] == (0, f"{program} {version}\n", "", [])


@pytest.mark.parametrize("program", SCRIPTS)
def test_completion_is_printed_quickly(program):
    code, said, complaint, loaded = answers(program)["--completion bash"]
    assert (code, complaint, loaded) == (0, "", [])
    assert said.endswith(f"complete -o default -F _{program.replace('-', '_')} {program}\n")


@pytest.mark.parametrize("command", MISTAKES)
def test_a_mistake_is_told_quickly_in_one_line(command):
    program, _, arguments = command.partition(" ")
    code, said, complaint, loaded = answers(program)[arguments]
    assert (code, said, loaded) == (2, "", [])
    assert complaint.startswith(program)
    assert MISTAKES[command] in complaint
    assert complaint.count("\n") == 1


def test_a_port_in_use_is_told_quickly():
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        (answer,) = run("tocom-serve", f"--port {port}")
    message = f"tocom-serve: cannot listen on 127.0.0.1, port {port}: Address already in use\n"
    assert answer == (2, "", message, [])
