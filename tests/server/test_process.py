"""Real processes that serve, and how they end."""

import http.client
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest

import server.process
from server.settings import Settings

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Process:
    """A server in a process of its own, on a free port."""

    process: subprocess.Popen
    log: Path
    greeting: str
    address: str


@pytest.fixture(scope="module")
def processes(tiny, tmp_path_factory) -> Iterator[dict[str, Process]]:
    """Servers that end in different ways, started together."""
    folder = tmp_path_factory.mktemp("processes")
    model = f"tiny={tiny.backbone},bank={tiny.bank}"
    command = [sys.executable, "-m", "server.cli", "--port", "0", "--model", model]
    delays = {"ended": 0, "drained": 8000, "hurried": 600_000}
    with ExitStack() as stack:
        started = {}
        for name, delay in delays.items():
            environment = os.environ | {
                "TOCOM_DEVICE": "cpu",
                "TOCOM_DRAIN_DELAY_MS": str(delay),
                "PYTHONPATH": str(ROOT),
            }
            log = folder / name
            process = stack.enter_context(
                subprocess.Popen(
                    command,
                    env=environment,
                    cwd=folder,
                    stdout=subprocess.PIPE,
                    stderr=stack.enter_context(log.open("w")),
                    text=True,
                )
            )
            stack.callback(process.kill)
            started[name] = process, log
        yield {name: greeted(process, log) for name, (process, log) in started.items()}


def greeted(process: subprocess.Popen, log: Path) -> Process:
    """Wait until a server says where it serves."""
    greeting = ""
    while "try it" not in greeting:
        line = process.stdout.readline()
        assert line, log.read_text()
        greeting += line
    address = re.search(r"Serving on (http://127\.0\.0\.1:\d+)", greeting)[1]
    return Process(process, log, greeting, address)


def ask(client: httpx.Client, photo: bytes) -> int:
    return client.post("/v1/classify?rate=5", files={"file": photo}).status_code


def test_a_process_says_how_to_use_it(processes):
    server = processes["ended"]
    assert "tiny: rates 0 to 5, bank tiny" in server.greeting
    assert f"{server.address}/docs" in server.greeting
    command = rf"curl -F file=@.+\.jpg '{server.address}/v1/classify\?rate=5'"
    assert re.search(command, server.greeting)


def test_a_request_that_has_begun_is_answered_after_ctrl_c(processes, photo):
    server = processes["ended"]
    host, port = server.address.removeprefix("http://").split(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=300)
    connection.putrequest("POST", "/v1/classify?rate=5")
    connection.putheader("Content-Length", str(len(photo)))
    connection.endheaders(photo[:100])
    with httpx.Client(base_url=server.address, timeout=300) as client:
        assert client.get("/readyz").status_code == 200  # by now the other one has begun
    server.process.send_signal(signal.SIGINT)
    with suppress(httpx.TransportError):
        while httpx.get(server.address + "/readyz", timeout=300):
            pass  # until it listens no more
    connection.send(photo[100:])
    answer = connection.getresponse()
    assert answer.status == 200
    assert json.loads(answer.read())["rate"] == 5
    assert server.process.wait(timeout=300) == 0
    assert "Traceback" not in server.log.read_text()


def test_sigterm_under_load_loses_no_request(processes, photo):
    """Clients go elsewhere once the server says that it is not ready; until then it serves."""
    server = processes["drained"]
    busy = threading.Barrier(5)

    def load() -> list[int]:
        with httpx.Client(base_url=server.address, timeout=300) as client:
            answers = [ask(client, photo)]
            busy.wait(300)
            while client.get("/readyz").status_code == 200:
                answers.append(ask(client, photo))
            # It is not ready, and serves whoever has not noticed.
            answers.append(ask(client, photo))
            return answers

    with ThreadPoolExecutor(4) as pool:
        loads = [pool.submit(load) for _ in range(4)]
        busy.wait(300)
        server.process.send_signal(signal.SIGTERM)
        for each in loads:
            assert set(each.result(300)) == {200}
    assert server.process.wait(timeout=300) == 0
    assert "Traceback" not in server.log.read_text()


def test_a_second_signal_ends_a_process_at_once(processes, photo):
    server = processes["hurried"]
    with httpx.Client(base_url=server.address, timeout=300) as client:
        server.process.send_signal(signal.SIGTERM)
        while client.get("/readyz").status_code == 200:
            pass
        assert ask(client, photo) == 200
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(timeout=300) == 128 + signal.SIGINT


def test_what_is_loaded_is_not_looked_through_for_garbage_again(monkeypatch):
    done = []
    for name in ("collect", "freeze"):
        monkeypatch.setattr(server.process.gc, name, lambda name=name: done.append(name))
    serving = object()
    made = server.process._Server(Settings(), lambda: None, done.append)
    made._is_ready(SimpleNamespace(state=SimpleNamespace(serving=serving)))
    assert done == ["collect", "freeze", serving]
