"""Two replicas under Ray as users have them: a program, HTTP, the program again for changes."""

import asyncio
import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import httpx
import psutil
import pytest
import torch
import yaml
from ray import serve
from ray.serve.schema import ServeDeploySchema

from adapters import Bank, Store
from server.client import Client
from server.engine.engine import Engine
from server.errors import UnavailableError, UnknownBankError
from server.observe import log
from server.ray import NAME, Arguments, Replica, UserConfig, build, main
from server.settings import load_settings
from tests.server.conftest import MAX_RATE, picture, png
from tocom import ConfigError

ROOT = Path(__file__).parents[2]
KEY = "admin-" + "k" * 16
PICTURES = [png(picture(seed)) for seed in range(4)]
CASES = [
    (index, rate, compensate)
    for index in range(len(PICTURES))
    for rate in range(MAX_RATE + 1)
    for compensate in (True, False)
]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config", "nix.toml"], "there is no configuration file nix.toml"),
        (["--port", "70000"], "setting port: Input should be less than or equal to 65535"),
        (["--replicas", "0"], "--replicas must be 1 or more"),
        (["--replicas", "2", "--max-replicas", "1"], "--replicas must be 1 or more, and --max-"),
        (["--bank", "tiny"], "--bank tiny: expected MODEL=NAME@DIGEST"),
        (["--bank", "tiny=better"], "--bank tiny=better: Value error, a bank is NAME@DIGEST or"),
    ],
)
def test_a_mistake_is_one_clear_line(arguments, message, capsys):
    assert main(arguments) == 2
    complaint = capsys.readouterr().err
    assert complaint.startswith(f"server.ray: {message}")
    assert complaint.count("\n") == 1


def test_a_port_in_use_is_not_shared(capsys):
    with socket.create_server(("127.0.0.1", 0)) as other:
        assert main(["--port", str(other.getsockname()[1])]) == 2
    assert "Address already in use" in capsys.readouterr().err


def test_a_replica_cannot_have_a_certain_gpu():
    with pytest.raises(ConfigError, match="must be auto, cpu or cuda, got 'cuda:1'"):
        build(Arguments(settings={"device": "cuda:1"}))


def test_the_file_for_clusters_says_what_there_is():
    file = yaml.safe_load((ROOT / "deploy" / "ray.yaml").read_text("utf-8"))
    (application,) = ServeDeploySchema.model_validate(file).applications
    (deployment,) = application.deployments
    assert (application.import_path, deployment.name) == ("server.ray:build", NAME)
    settings = load_settings(**Arguments.model_validate(application.args).settings)
    assert deployment.autoscaling_config["target_ongoing_requests"] == settings.max_batch
    assert UserConfig.model_validate(deployment.user_config).banks == {}


@pytest.fixture
def replica(settings, monkeypatch) -> Replica:
    context = SimpleNamespace(replica_id=SimpleNamespace(unique_id="one"))
    monkeypatch.setattr(serve, "get_replica_context", lambda: context)
    monkeypatch.setattr(log, "configure", lambda settings: None)
    return Replica(settings)


def test_banks_are_what_the_user_config_says_whatever_they_were(replica, bank_folder):
    digest = Bank.load(bank_folder).info.digest

    def banks(**wanted: str | None) -> dict[str, str | None]:
        asyncio.run(replica.reconfigure({"banks": wanted}))
        models = replica.__serve_build_asgi_app__().state.serving.models.all()
        return {model.name: model.bank and model.bank.info.digest for model in models}

    assert banks() == {"tiny": digest, "bare": None}
    assert banks(tiny=None, bare=f"tiny@{digest[:8]}") == {"tiny": None, "bare": digest}
    assert banks(bare=digest) == {"tiny": digest, "bare": digest}
    with pytest.raises(UnknownBankError, match="no bank is 'tiny@00000000'"):
        banks(tiny="tiny@00000000")
    assert banks() == {"tiny": digest, "bare": None}


def test_a_replica_whose_engine_is_stuck_is_not_healthy(replica, monkeypatch):
    asyncio.run(replica.check_health())
    monkeypatch.setattr(Engine, "silence", 61.0)
    with pytest.raises(UnavailableError, match="the engine has not answered"):
        asyncio.run(replica.check_health())


@dataclass(frozen=True)
class Cluster:
    """A program that runs two replicas, and how to run it again to change them."""

    program: subprocess.Popen[str]
    command: list[str]
    environment: dict[str, str]
    client: httpx.Client

    def change(self, *arguments: str) -> None:
        """Ask the running cluster for the same with other arguments."""
        command = [*self.command, "--address", "auto", *arguments]
        done = subprocess.run(
            command, check=False, env=self.environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr

    def replica(self) -> int:
        """Return the process of a replica."""
        for process in psutil.Process(self.program.pid).children(recursive=True):
            if "ray::ServeReplica" in " ".join(process.cmdline()):
                return process.pid
        raise AssertionError("there is no replica")


@pytest.fixture(scope="module")
def other_bank(bank_folder) -> Bank:
    """A bank that says other things than the one that the server begins with."""
    bank = Bank.load(bank_folder)
    info = bank.info.model_copy(update={"digest": ""})
    return Bank(info, {name: tensor / 2 for name, tensor in bank.tensors.items()})


@pytest.fixture(scope="module")
def cluster(tiny, other_bank, tmp_path_factory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("ray")
    Store(folder / "store").publish(other_bank)
    (folder / "server.toml").write_text(
        f'device = "cpu"\nadmin_key = "{KEY}"\nstore = "{folder}/store"\n'
        f'[[models]]\nname = "tiny"\nbackbone = "{tiny.backbone}"\nbank = "{tiny.bank}"\n'
    )
    command = [sys.executable, "-m", "server.ray", "--config", str(folder / "server.toml")]
    command += ["--replicas", "2", "--cpus", "0.5"]
    with (
        # A socket's path has to be short.
        tempfile.TemporaryDirectory(prefix="ray-") as ray_folder,
        (folder / "log").open("w+") as log,
    ):
        # Ray keeps a token at home.
        ours = {"HOME": str(folder), "PYTHONPATH": str(ROOT), "RAY_TMPDIR": ray_folder}
        if sys.dont_write_bytecode:
            # Six processes import the same: the first one compiles it for all.
            ours |= {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": str(folder / "bytecode")}
        environment = os.environ | ours
        with subprocess.Popen(
            [*command, "--port", "0"],
            env=environment,
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        ) as program:
            try:
                address = read_address(program, folder / "log")
                with httpx.Client(base_url=address, timeout=60) as client:
                    yield Cluster(program, command, environment, client)
                left = psutil.Process(program.pid).children(recursive=True)
                program.send_signal(signal.SIGTERM)
                assert program.wait(timeout=120) == 0
                assert psutil.wait_procs(left, timeout=60)[1] == []
            finally:
                program.kill()


def read_address(program: subprocess.Popen[str], log: Path) -> str:
    while line := program.stdout.readline():
        if found := re.search(r"Serving on (http://\S+)", line):
            return found[1]
    raise AssertionError(log.read_text())


def ask(client: httpx.Client, index: int, rate: int, compensate: bool) -> httpx.Response:
    return client.post(
        "/v1/classify",
        params={"rate": rate, "compensate": compensate, "logits": True},
        files={"file": PICTURES[index]},
    )


def test_two_replicas_answer_mixed_rates_as_one_server_does(cluster, client):
    asked = random.Random(0).sample(CASES, k=len(CASES)) * 3
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda case: ask(cluster.client, *case), asked))
    alone = {case: ask(client, *case).json() for case in CASES}

    for case, answer in zip(asked, answers, strict=True):
        body, expected = answer.json(), alone[case]
        for name in ("model", "rate", "compensate", "tokens", "macs", "bank_digest"):
            assert body[name] == expected[name]
        torch.testing.assert_close(
            torch.tensor(body["logits"]), torch.tensor(expected["logits"]), atol=1e-4, rtol=0
        )
        # Ray's proxy has a hand in it, and must not add a second one.
        assert answer.headers["x-request-id"] == body["request_id"]
    assert len({answer.headers["x-replica"] for answer in answers}) == 2


def test_banks_cannot_be_changed_on_one_replica_alone(cluster, other_bank):
    answer = cluster.client.put(
        "/v1/models/tiny/bank",
        json={"bank": other_bank.info.digest},
        headers={"X-API-Key": KEY},
    )
    assert answer.status_code == 403
    assert "whose banks are changed together" in answer.json()["detail"]


def test_a_bank_is_swapped_on_all_replicas_while_they_serve(cluster, bank_folder, other_bank):
    old, new = Bank.load(bank_folder).info.digest, other_bank.info.digest
    seen: list[tuple[str, str]] = []
    done = threading.Event()

    def load() -> None:
        while not done.is_set():
            answer = ask(cluster.client, 0, 3, True)
            assert answer.status_code == 200
            seen.append((answer.headers["x-replica"], answer.json()["bank_digest"]))

    with ThreadPoolExecutor(4) as pool:
        loads = [pool.submit(load) for _ in range(4)]
        try:
            cluster.change("--bank", f"tiny=tiny@{new[:12]}")
            # Those that were on their way may have begun before it was done.
            changed = len(seen) + len(loads)
            while len(seen) < changed + 40 and not any(each.done() for each in loads):
                time.sleep(0.01)
        finally:
            done.set()
        for each in loads:
            each.result()

    assert {digest for _, digest in seen} == {old, new}
    assert {digest for _, digest in seen[changed:]} == {new}
    # Both replicas are those of before: none was started for it.
    assert len({replica for replica, _ in seen}) == 2
    assert len({replica for replica, _ in seen[changed:]}) == 2


class Noting(httpx.HTTPTransport):
    """Notes which replicas have answered."""

    def __init__(self, answered: list[str]) -> None:
        super().__init__()
        self.answered = answered

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        response = super().handle_request(request)
        if response.is_success:
            self.answered.append(response.headers["x-replica"])
        return response


def test_a_replica_that_is_killed_loses_nothing_that_a_retry_cannot_recover(cluster, other_bank):
    expected = {case: ask(cluster.client, *case).json()["logits"] for case in CASES}
    before = {ask(cluster.client, 0, 0, True).headers["x-replica"] for _ in range(20)}
    answered: list[str] = []
    url = str(cluster.client.base_url)

    def load(client: Client, seed: int) -> None:
        cases = random.Random(seed)
        while set(answered) <= before:
            case = index, rate, compensate = cases.choice(CASES)
            answer = client.classify(PICTURES[index], rate=rate, compensate=compensate, logits=True)
            assert answer.logits == pytest.approx(expected[case], abs=1e-4)
            # The replica that comes in its place knows of the change, too.
            assert answer.bank_digest == other_bank.info.digest

    with (
        Client(url, retries=9, transport=Noting(answered)) as client,
        ThreadPoolExecutor(4) as pool,
    ):
        loads = [pool.submit(load, client, seed) for seed in range(4)]
        while len(answered) < 20 and not any(each.done() for each in loads):
            time.sleep(0.01)
        os.kill(cluster.replica(), signal.SIGKILL)
        for each in loads:
            each.result()
