"""The program itself: what it refuses, and a real process that serves and ends."""

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from server.cli import main
from server.models.pictures import decode

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def untouched():
    """Main takes SIGTERM over; the tests' own process gets it back."""
    handler = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, handler)


def test_it_starts_without_torchs_compiler_which_works_all_the_same():
    program = """if True:
        import sys
        from server.cli import main

        photo, = sys.argv[1:]
        assert main(["classify", photo, "--rate", "8"]) == 0
        assert "torch._dynamo" not in sys.modules

        import torch
        from torchvision.ops import roi_align

        compiled = torch.compile(lambda x: x + 1, backend="eager")
        assert compiled(torch.ones(1)) == 2
        assert roi_align(torch.ones(1, 3, 8, 8), [torch.tensor([[0.0, 0, 4, 4]])], 2).sum() == 12
    """
    photo = min((ROOT / "tocom" / "bundled" / "samples").glob("*.jpg"))
    subprocess.run([sys.executable, "-c", program, photo], check=True, timeout=120)


def run_program(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a program in the project's folder; returns its exit code and all that it said."""
    return subprocess.run(
        [sys.executable, "-c", program, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        check=False,
        timeout=300,
    )


@pytest.mark.parametrize(
    ("name", "arguments", "code"),
    [
        ("SIGINT", [], 0),
        ("SIGTERM", [], 0),
        ("SIGINT", ["check"], 128 + signal.SIGINT),
        ("SIGTERM", ["check"], 128 + signal.SIGTERM),
    ],
)
def test_a_signal_while_modules_are_imported(name, arguments, code):
    program = """if True:
        import os
        import signal
        import sys

        class Finder:
            def find_spec(self, module, path, target=None):
                if module == "torch":
                    os.kill(os.getpid(), getattr(signal, sys.argv[1]))

        sys.meta_path.insert(0, Finder())
        from server.cli import main

        sys.exit(main(sys.argv[2:]))
    """
    ended = run_program(program, name, *arguments)
    assert (ended.returncode, ended.stdout) == (code, "")


def test_ctrl_c_while_a_graph_is_compiled(tiny):
    """The process waits for OpenVINO, without which it would be aborted."""
    pytest.importorskip("openvino")
    program = """if True:
        import os
        import signal
        import sys
        import threading

        from server.cli import main
        from server.models import graphs
        from tocom.engines import openvino

        compile_graph = openvino.Graph

        def compile_for_long(*arguments):
            os.kill(os.getpid(), signal.SIGINT)
            for thread in threading.enumerate():
                if thread.name == "forward":
                    thread.join()
            graph = compile_graph(*arguments)
            print("compiled", flush=True)
            return graph

        openvino.Graph = compile_for_long
        graphs.WORTH = 0.0
        sys.exit(main(sys.argv[1:]))
    """
    ended = run_program(program, "--port", "0", "--model", f"tiny={tiny.backbone}")
    assert ended.returncode == 0, ended.stdout
    assert "Traceback" not in ended.stdout
    assert "compiled\n" in ended.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "tiny"], "--model tiny: expected NAME=BACKBONE"),
        (["--model", "=x"], "--model =x: expected NAME=BACKBONE"),
        (
            ["--model", "a=x,bnak=y"],
            "with one of task, bank, architecture, source, ladder, got 'bnak=y'",
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
    told = capsys.readouterr().out
    assert set(re.findall(r"--\w+", told)) == {"--help", "--host", "--port", "--config", "--model"}
    assert re.findall(r"^    (\w+) ", told, re.MULTILINE) == ["check", "classify"]


@pytest.fixture
def models(tiny, monkeypatch) -> list[str]:
    monkeypatch.setenv("TOCOM_DEVICE", "cpu")
    return [
        "--model",
        f"tiny={tiny.backbone},bank={tiny.bank}",
        "--model",
        f"bare={tiny.backbone},source=2",
    ]


def test_check_tells_what_would_be_served(models, served, capsys):
    assert main([*models, "check"]) == 0
    heading, tiny, bare = capsys.readouterr().out.splitlines()
    assert heading.split() == ["model", "backbone", "rates", "bank", "memory"]
    bank = served.bank.info
    assert tiny.split()[:4] == ["tiny", served.backbone.name, "0..5", f"tiny@{bank.digest[:12]}"]
    assert tiny.endswith("more once every rate was asked for")
    assert bare.split()[2:4] == ["0..5", "none"]


def test_check_of_what_cannot_be_served(models, capsys):
    assert main(["check", *models[:2], "--model", "other=bundled:nix"]) == 2
    streams = capsys.readouterr()
    assert "nothing bundled is called 'nix'" in streams.err
    assert streams.err.count("\n") == 1


@pytest.fixture
def photo_file(photo, tmp_path) -> str:
    (tmp_path / "photo.png").write_bytes(photo)
    return str(tmp_path / "photo.png")


def test_classify_without_a_server(models, served, photo, photo_file, capsys):
    arguments = ["classify", photo_file, photo_file, "--rate", "3", "--top-k", "2", *models]
    assert main([*arguments, "--json"]) == 0
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    image = served.transform(decode(photo, 10**6))
    scores = served.at(3, True)(image[None])[0].logits.softmax(0)
    assert first == second
    assert first["photo"] == photo_file
    assert (first["model"], first["rate"], first["compensate"]) == ("tiny", 3, True)
    best = first["predictions"][0]
    assert best["index"] == int(scores.argmax())
    assert best["score"] == pytest.approx(float(scores.max()), abs=1e-5)

    assert main(arguments) == 0
    told = capsys.readouterr().out.splitlines()
    assert len(told) == 2 * 3
    assert told[0] == photo_file
    assert told[1].split("%") == [f"{100 * best['score']:7.1f}", f"  {best['label']}"]


def test_photographs_that_cannot_be_classified_do_not_stop_the_others(
    models, photo_file, tmp_path, capsys
):
    (tmp_path / "text.png").write_bytes(b"just a text")
    missing, text = str(tmp_path / "missing.png"), str(tmp_path / "text.png")
    assert main(["classify", missing, text, photo_file, *models]) == 1
    streams = capsys.readouterr()
    assert streams.out.startswith(photo_file)
    assert streams.err.splitlines() == [
        f"tocom-serve: {missing}: it cannot be read: No such file or directory",
        f"tocom-serve: {text}: the content is not a JPEG, PNG or WebP image",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rate", "auto"], "runs at the rates 0 to 5"),
        (["--rate", "6"], "runs at the rates 0 to 5"),
        (["--top-k", "11"], "top_k must be in 1..10"),
        (["--top-k", "0"], "top_k must be in 1..10"),
    ],
)
def test_classify_says_what_is_allowed(models, photo_file, arguments, message, capsys):
    assert main(["classify", photo_file, *models, *arguments]) == 2
    assert message in capsys.readouterr().err


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
    delays = {"ended": 0, "drained": 3000, "hurried": 600_000}
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
