"""The program itself: what it does and refuses, and how it ends before it serves."""

import json
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from server.arguments import parser, settings
from server.cli import main
from server.commands import greet
from server.models.registry import Registry
from server.settings import Settings
from tests.server.conftest import seen
from tests.server.segmenters import streets

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
        assert main(["classify", photo, "--rate", "2"]) == 0
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


def quiet(said: str) -> bool:
    """Whether a program has said nothing but that it starts."""
    return all(re.match("Listening on |.* INFO ", line) for line in said.splitlines())


@pytest.mark.parametrize(
    ("name", "arguments", "code"),
    [
        ("SIGINT", ["--port", "0"], 128 + signal.SIGINT),
        ("SIGTERM", ["--port", "0"], 128 + signal.SIGTERM),
        ("SIGINT", ["check"], 128 + signal.SIGINT),
        ("SIGTERM", ["check"], 128 + signal.SIGTERM),
    ],
)
def test_a_signal_while_modules_are_imported(name, arguments, code):
    program = """if True:
        import os
        import signal
        import sys
        import threading

        class Finder:
            def find_spec(self, module, path, target=None):
                if module == "torch":
                    os.kill(os.getpid(), getattr(signal, sys.argv[1]))
                    if threading.current_thread() is not threading.main_thread():
                        threading.Event().wait()  # until the main thread has taken note

        sys.meta_path.insert(0, Finder())
        from server.cli import main

        sys.exit(main(sys.argv[2:]))
    """
    ended = run_program(program, name, *arguments)
    assert ended.returncode == code
    assert quiet(ended.stdout)


def test_ctrl_c_while_the_models_warm_up_is_quiet(tiny):
    program = """if True:
        import os
        import signal
        import sys
        import threading

        from server.cli import main
        from server.models.served import RateWork

        def warm_up(work, sizes):
            os.kill(os.getpid(), signal.SIGINT)
            threading.Event().wait()

        RateWork.warm_up = warm_up
        sys.exit(main(sys.argv[1:]))
    """
    ended = run_program(program, "--port", "0", "--model", f"tiny={tiny.backbone}")
    assert ended.returncode == 128 + signal.SIGINT
    assert re.search(r"^Listening on http://127\.0\.0\.1:\d+: ", ended.stdout, re.MULTILINE)
    assert quiet(ended.stdout)


def test_ctrl_c_while_a_graph_is_compiled(tiny):
    """The process waits for OpenVINO, without which it would be aborted."""
    pytest.importorskip("openvino")
    program = """if True:
        import os
        import signal
        import sys
        import threading

        from server import commands
        from server.cli import main
        from server.models import graphs
        from tocom.engines import openvino

        compile_graph = openvino.Graph
        ready = threading.Event()
        commands.greet = lambda *_: ready.set()

        def compile_for_long(*arguments):
            ready.wait()
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
            "with one of task, bank, architecture, source, ladder, cascade, got 'bnak=y'",
        ),
        (["--model", "a=x,bank="], "expected KEY=VALUE"),
        (
            ["--model", "a=x,bank=b,bank=c"],
            "only ladder may be repeated, got 'bank=c' after 'b'",
        ),
        (
            ["--port", "0", "--model", "a=bundled:deit_tiny,ladder=tome,ladder=nix"],
            "model 'a': cannot read the ladder nix: No such file or directory",
        ),
        (
            ["--model", "a=x,source=high"],
            "setting models.0.source must be a whole number, got 'high'",
        ),
        (["--model", "a=x", "--model", "a=y"], "two models are called 'a'"),
        (["--config", "nix.toml"], "there is no configuration file nix.toml"),
        (["--port", "70000"], "setting port must be at most 65535, got '70000'"),
        (["--port", "http"], "setting port must be a whole number, got 'http'"),
        (["--log-level", "loud"], "setting log_level must be 'critical', 'error', 'warning', "),
        (
            ["--port", "0", "--model", "a=bundled:nix"],
            "nothing bundled is called 'nix'; there are: ",
        ),
        (["--host", "192.0.2.1"], "cannot listen on 192.0.2.1, port 8000: Cannot assign"),
        (["--host", "a..b"], "cannot listen on a..b, port 8000: "),
    ],
)
def test_a_mistake_is_one_clear_line(arguments, message, capsys):
    assert main(arguments) == 2
    complaint = capsys.readouterr().err
    assert complaint.startswith("tocom-serve: ")
    assert message in complaint
    assert complaint.count("\n") == 1


def test_every_setting_is_an_option_with_its_help(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    told = capsys.readouterr().out
    options = {name.replace("_", "-") for name in Settings.model_fields}
    options -= {"models", "admin-key", "api-keys"}
    negated = {"no-auto", "no-cache-shared", "no-fast-resize", "no-otel", "no-reduce-jpegs"}
    assert set(re.findall(r"--([a-z][\w-]*)", told)) == {
        *options, *negated, "help", "version", "completion", "config", "model",
    }  # fmt: skip
    assert re.findall(r"^    (\w+) ", told, re.MULTILINE) == ["check", "classify"]
    words = " ".join(told.split())
    assert "--max-batch N images in one forward (default: 16)" in words
    assert "`*`: any; may be repeated" in words
    assert "beyond: 503" in words


def test_arguments_are_settings(monkeypatch):
    monkeypatch.setenv("TOCOM_MAX_QUEUE", "7")
    given = ["--port", "9", "--no-auto", "--threads=3", "--device", "cpu", "--slo-ms", "80"]
    read = settings(parser().parse_args(given))
    assert (read.port, read.auto, read.threads, read.device) == (9, False, 3, "cpu")
    assert (read.slo_ms, read.max_queue, read.otel) == (80, 7, None)
    # Before a command and after it.
    read = settings(parser().parse_args(["--threads", "3", "check", "--device", "cpu"]))
    assert (read.threads, read.device) == (3, "cpu")
    given = ["--model=a=x", "--cors-origins=*", "check", "--model=b=y"]
    read = settings(parser().parse_args(given))
    assert [model.name for model in read.models] == ["a", "b"]
    assert read.cors_origins == ("*",)


def test_a_mistake_after_a_command_names_the_command(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["classify"])
    assert capsys.readouterr().err.startswith("tocom-serve classify: the following arguments")


def test_the_greeting_needs_no_output(monkeypatch, served):
    monkeypatch.setattr(sys, "stdout", None)
    greet(SimpleNamespace(models=Registry([served])), "http://127.0.0.1:8000")


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
    image = seen(served, photo)
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


def test_classify_takes_the_first_model_that_classifies(tiny, models, photo_file, tmp_path, capsys):
    segmenter = streets(tiny, tmp_path)
    first = ["--model", f"streets={segmenter.backbone},task={segmenter.task}"]
    assert main(["classify", photo_file, "--json", *first, *models]) == 0
    assert json.loads(capsys.readouterr().out)["model"] == "tiny"
    assert main(["classify", photo_file, *first]) == 2
    assert "the model 'streets' is for segmentation" in capsys.readouterr().err


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
        (
            ["--rate", "auto"],
            "rate auto needs a server; here it is a whole number from 0 to 5",
        ),
        (["--rate", "cascade"], "rate cascade needs a server"),
        (["--rate", "6"], "runs at the rates 0 to 5"),
        (["--top-k", "11"], "top_k must be in 1..10"),
        (["--top-k", "0"], "top_k must be in 1..10"),
    ],
)
def test_classify_says_what_is_allowed(models, photo_file, arguments, message, capsys):
    assert main(["classify", photo_file, *models, *arguments]) == 2
    assert message in capsys.readouterr().err
