"""The program itself: what it refuses, and a real process that serves and ends."""

import os
import re
import signal
import socket
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest

from server.cli import main

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def untouched():
    """Main takes SIGTERM over; the tests' own process gets it back."""
    handler = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, handler)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "tiny"], "--model tiny: expected NAME=BACKBONE"),
        (["--model", "=x"], "--model =x: expected NAME=BACKBONE"),
        (
            ["--model", "a=x,bnak=y"],
            "expected KEY=VALUE with one of bank, architecture, source, got 'bnak=y'",
        ),
        (["--model", "a=x,bank="], "expected KEY=VALUE"),
        (
            ["--model", "a=x,source=high"],
            "setting models.0.source: Input should be a valid integer",
        ),
        (["--model", "a=x", "--model", "a=y"], "two models are called 'a'"),
        (["--config", "nix.toml"], "there is no configuration file nix.toml"),
        (["--port", "70000"], "setting port: Input should be less than or equal to 65535"),
        (
            ["--port", "0", "--model", "a=bundled:nix"],
            "nothing bundled is called 'nix'; there are: ",
        ),
        (["--host", "192.0.2.1"], "cannot listen on 192.0.2.1, port 8000: Cannot assign"),
    ],
)
def test_a_mistake_is_one_clear_line(arguments, message, capsys):
    assert main(arguments) == 2
    complaint = capsys.readouterr().err
    assert complaint.startswith("tocom-serve: ")
    assert message in complaint
    assert complaint.count("\n") == 1


def test_a_port_in_use(capsys):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert main(["--port", str(port)]) == 2
    message = f"tocom-serve: cannot listen on 127.0.0.1, port {port}: Address already in use\n"
    assert capsys.readouterr().err == message


def test_help_names_the_options(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["--help"])
    assert exit_.value.code == 0
    assert set(re.findall(r"--\w+", capsys.readouterr().out)) == {
        "--help",
        "--host",
        "--port",
        "--config",
        "--model",
    }


@pytest.fixture
def processes(tiny, tmp_path):
    """A server for each signal, in processes of their own and on free ports, started together."""
    environment = os.environ | {"TOCOM_DEVICE": "cpu", "PYTHONPATH": str(ROOT)}
    model = f"tiny={tiny.backbone},bank={tiny.bank}"
    command = [sys.executable, "-m", "server.cli", "--port", "0", "--model", model]
    with ExitStack() as stack:
        started = {}
        for ending in (signal.SIGINT, signal.SIGTERM):
            log = stack.enter_context((tmp_path / ending.name).open("w+"))
            process = stack.enter_context(
                subprocess.Popen(
                    command,
                    env=environment,
                    cwd=tmp_path,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    text=True,
                )
            )
            stack.callback(process.kill)
            started[ending] = process
        yield started


def test_a_process_serves_until_it_is_told_to_end(processes, photo, tmp_path):
    for ending, process in processes.items():
        log = tmp_path / ending.name
        greeting = ""
        while "try it" not in greeting:
            line = process.stdout.readline()
            assert line, log.read_text()
            greeting += line
        address = re.search(r"Serving on (http://127\.0\.0\.1:\d+)", greeting)[1]
        assert "tiny: rates 0 to 5, bank tiny" in greeting
        assert f"{address}/docs" in greeting
        assert re.search(rf"curl -F file=@.+\.jpg '{address}/v1/classify\?rate=5'", greeting)
        with httpx.Client(base_url=address, timeout=300) as client:
            answer = client.post("/v1/classify?rate=5", files={"file": photo})
            assert answer.status_code == 200
            assert answer.json()["rate"] == 5
        process.send_signal(ending)
        assert process.wait(timeout=300) == 0
        assert "Traceback" not in log.read_text()
