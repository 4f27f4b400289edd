"""All programs: what they tell of themselves, and of mistakes, without importing torch."""

import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.test_packaging import PYPROJECT, SCRIPTS

ROOT = Path(__file__).parents[1]

#: Ends with the program's code, and says what it has imported that takes seconds.
PROGRAM = """if True:
    import sys
    from importlib import import_module

    main = getattr(import_module(sys.argv[1]), "main")
    try:
        code = main(sys.argv[2:])
    except SystemExit as end:
        code = end.code
    heavy = {"torch", "timm", "openvino", "transformers", "accelerate", "matplotlib"}
    print("imported:", *sorted(heavy & {*sys.modules}))
    sys.exit(code)
"""


def run(program: str, *arguments: str) -> tuple[int, str, str]:
    """Run a program in a process of its own; returns its code and what it says.

    Fails if the process has imported what takes seconds.
    """
    module = SCRIPTS[program].partition(":")[0]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, module, *arguments],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    said, _, imported = done.stdout.rpartition("imported:")
    assert imported == "\n", done.stderr
    return done.returncode, said, done.stderr


@pytest.mark.parametrize("program", SCRIPTS)
def test_help_and_version_are_quick(program):
    code, said, _ = run(program, "--help")
    assert code == 0
    assert re.match(rf"usage: {program} ", said)
    version = PYPROJECT["project"]["version"]
    assert run(program, "--version") == (0, f"{program} {version}\n", "")


@pytest.mark.parametrize("program", SCRIPTS)
def test_completion_is_printed_quickly(program):
    code, said, complaint = run(program, "--completion", "bash")
    assert (code, complaint) == (0, "")
    assert said.endswith(f"complete -o default -F _{program.replace('-', '_')} {program}\n")


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("tocom-serve --prot 9000", "there is no option --prot, did you mean --port?"),
        ("tocom-serve chekc", "argument COMMAND: there is no 'chekc', did you mean check? There"),
        ("tocom-bank inspect x --jsn", "there is no option --jsn, did you mean --json?"),
        ("tocom-bank polish", "argument COMMAND: there is no 'polish', did you mean publish? "),
        ("tocom-bank --completion sh", "there is no 'sh', did you mean "),
        ("tocom-bank xyz", "argument COMMAND: there is no 'xyz'; there are: inspect, list, "),
        ("tocom-train distill x --floder y", "no option --floder, did you mean --folder?"),
        ("tocom-train evaluate x --method lora", "evaluate: there is no option --method"),
        ("tocom-train evaluate evry-rate", "preset 'evry-rate', did you mean every-rate? (tocom-"),
        ("tocom-train evaluate every-rate bank", "an override is key=value, got 'bank'"),
    ],
)
def test_a_mistake_is_told_quickly_in_one_line(command, message):
    code, said, complaint = run(*command.split())
    assert (code, said) == (2, "")
    assert complaint.startswith(command.split()[0])
    assert message in complaint
    assert complaint.count("\n") == 1


def test_a_port_in_use_is_told_quickly():
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        code, _, complaint = run("tocom-serve", "--port", str(port))
    assert code == 2
    assert complaint.endswith(f"port {port}: Address already in use\n")
