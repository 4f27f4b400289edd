"""Two replicas under Ray as users have them: `serve run`, HTTP, `serve deploy` for changes."""

import asyncio
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from types import SimpleNamespace
from typing import IO, Any

import httpx
import psutil
import pytest
import ray
import torch
import yaml
from pydantic import ValidationError
from ray import serve
from ray.serve.schema import ServeDeploySchema

from adapters import Bank, Store
from server.client import Client
from server.engine.engine import Engine
from server.errors import UnavailableError, UnknownBankError
from server.observe import log
from server.ray import NAME, Arguments, Replica, UserConfig, build
from server.settings import load_settings
from tests.server.conftest import MAX_RATE, picture, png
from tests.server.works import PATIENCE
from tocom import ConfigError, StoreError

SERVE = str(Path(sys.executable).with_name("serve"))
ROOT = Path(__file__).parents[2]
KEY = "admin-" + "k" * 16
PICTURES = [png(picture(seed)) for seed in range(4)]
CASES = [
    (index, rate, compensate)
    for index in range(len(PICTURES))
    for rate in range(MAX_RATE + 1)
    for compensate in (True, False)
]


def test_a_replica_cannot_have_a_certain_gpu():
    with pytest.raises(ConfigError, match="must be auto, cpu or cuda, got 'cuda:1'"):
        build(Arguments(settings={"device": "cuda:1"}))


@pytest.mark.parametrize("there", [0, 1])
@pytest.mark.parametrize("started", [False, True], ids=["before Ray", "in Ray"])
def test_a_replica_gets_a_gpu_if_there_are_any(monkeypatch, there, started):
    monkeypatch.setattr(ray, "is_initialized", lambda: started)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 2.0, "GPU": float(there)})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(there))
    for device, gpus in (("auto", there), ("cpu", 0), ("cuda", 1)):
        deployment = build(Arguments(settings={"device": device}))._bound_deployment
        assert deployment.ray_actor_options["num_gpus"] == gpus


def test_a_bank_is_named_with_its_digest():
    with pytest.raises(ValidationError, match="a bank is NAME@DIGEST or 8 or more digits"):
        UserConfig.model_validate({"banks": {"tiny": "better"}})


def test_the_file_for_clusters_says_what_there_is():
    file = yaml.safe_load((ROOT / "deploy" / "ray.yaml").read_text("utf-8"))
    (application,) = ServeDeploySchema.model_validate(file).applications
    (deployment,) = application.deployments
    assert (application.import_path, deployment.name) == ("server.ray:build", NAME)
    settings = load_settings(**Arguments.model_validate(application.args).settings)
    assert deployment.autoscaling_config["target_ongoing_requests"] == settings.max_batch
    assert UserConfig.model_validate(deployment.user_config).banks == {}


@pytest.fixture
def store(bank_folder, tmp_path) -> Store:
    """It has the bank that the server begins with, too."""
    store = Store(tmp_path / "store")
    store.publish(Bank.load(bank_folder))
    return store


@pytest.fixture
def replica(settings, store, monkeypatch) -> Replica:
    context = SimpleNamespace(replica_id=SimpleNamespace(unique_id="one"))
    monkeypatch.setattr(serve, "get_replica_context", lambda: context)
    monkeypatch.setattr(log, "configure", lambda settings: None)
    return Replica(settings.model_copy(update={"store": store.root}))


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


def test_a_bank_that_serves_no_more_can_be_deleted(replica, store):
    with pytest.raises(StoreError, match="is in use"):
        store.delete("tiny")
    asyncio.run(replica.reconfigure({"banks": {"tiny": None}}))
    store.delete("tiny")
    assert store.versions() == []


def test_a_replica_whose_engine_is_stuck_is_not_healthy(replica, monkeypatch):
    asyncio.run(replica.check_health())
    monkeypatch.setattr(Engine, "silence", 61.0)
    with pytest.raises(UnavailableError, match="the engine has not answered"):
        asyncio.run(replica.check_health())


@dataclass(frozen=True)
class Cluster:
    """`serve run` with two replicas, and `serve deploy` to change them."""

    file: dict[str, Any]
    folder: Path
    environment: dict[str, str]
    program: subprocess.Popen[str]
    dashboard: str
    client: httpx.Client

    def deploy(self, **banks: str) -> None:
        """Ask for the same with other banks; Ray has heard of it then, replicas may not have."""
        path = serve_file(self.folder, self.file, banks)
        command = [SERVE, "deploy", path, "--address", self.dashboard]
        subprocess.run(command, check=True, env=self.environment, capture_output=True)

    def replica(self) -> int:
        """Return the process of a replica."""
        for process in psutil.Process(self.program.pid).children(recursive=True):
            if "ray::ServeReplica" in " ".join(process.cmdline()):
                return process.pid
        raise AssertionError("there is no replica")


def serve_file(folder: Path, file: dict[str, Any], banks: dict[str, str]) -> Path:
    """Write a Serve config file; JSON is YAML, too."""
    (deployment,) = file["applications"][0]["deployments"]
    deployment["user_config"] = {"banks": banks}
    path = folder / "serve.yaml"
    path.write_text(json.dumps(file))
    return path


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
    settings = folder / "server.toml"
    settings.write_text(
        f'device = "cpu"\nadmin_key = "{KEY}"\nstore = "{folder}/store"\n'
        f'[[models]]\nname = "tiny"\nbackbone = "{tiny.backbone}"\nbank = "{tiny.bank}"\n'
    )
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    application = {
        "name": NAME,
        "import_path": "server.ray:build",
        "args": {"config": str(settings)},
        "deployments": [
            {
                "name": NAME,
                "num_replicas": 2,
                "ray_actor_options": {"num_cpus": 0.5},
                "graceful_shutdown_timeout_s": 1,
            },
        ],
    }
    file = {"http_options": {"port": port}, "applications": [application]}
    # A socket's path has to be short.
    with tempfile.TemporaryDirectory(prefix="ray-") as ray_folder:
        # Ray keeps a token at home.
        ours = {"HOME": str(folder), "PYTHONPATH": str(ROOT), "RAY_TMPDIR": ray_folder}
        ours |= {"RAY_AUTH_MODE": "token", "RAY_USAGE_STATS_ENABLED": "0"}
        # On a busy machine Ray would take its proxy for dead while that still begins.
        ours |= {f"RAY_SERVE_PROXY_{each}_CHECK_TIMEOUT_S": "120" for each in ("READY", "HEALTH")}
        environment = os.environ | ours
        with subprocess.Popen(
            [SERVE, "run", serve_file(folder, file, {})],
            env=environment,
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ) as program:
            said: SimpleQueue[str] = SimpleQueue()
            reader = threading.Thread(target=read, args=(program.stdout, said))
            reader.start()
            try:
                dashboard = wait_for(r"dashboard at \S*?(http://[\d.:]+)", said)
                wait_for(r"(model tiny: (\d+) of \2 rates are warm)", said)
                replicas = set()
                with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=PATIENCE) as client:
                    while len(replicas) < 2:
                        replicas.add(client.get("/v1/models").headers["x-replica"])
                    yield Cluster(file, folder, environment, program, dashboard, client)
            finally:
                program.send_signal(signal.SIGINT)
                reader.join()


def read(output: IO[str], said: SimpleQueue[str]) -> None:
    """Read all that a program says, so that it never waits for it; an empty line is the end."""
    for line in output:
        said.put(line)
    said.put("")


def wait_for(pattern: str, said: SimpleQueue[str]) -> str:
    """Return what is found in the next line that has it."""
    lines = []
    for line in iter(said.get, ""):
        if found := re.search(pattern, line):
            return found[1]
        lines.append(line)
    raise AssertionError("".join(lines))


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
    before: set[str] = set()
    while len(before) < 2:  # on a busy machine Ray may ask one of them for long
        before.add(ask(cluster.client, 0, 3, True).headers["x-replica"])
    under_way = threading.Semaphore(0)

    def load() -> None:
        changed: set[str] = set()
        for asked in range(10_000):
            answer = ask(cluster.client, 0, 3, True)
            assert answer.status_code == 200
            replica, digest = answer.headers["x-replica"], answer.json()["bank_digest"]
            # Nothing is started for it, and none goes back to the old bank.
            assert replica in before
            assert digest == new if replica in changed else digest in (old, new)
            if digest == new:
                changed.add(replica)
            if asked == 10:
                under_way.release()
            if changed == before:
                return
        raise AssertionError("the bank has not changed everywhere")

    with ThreadPoolExecutor(4) as pool:
        loads = [pool.submit(load) for _ in range(4)]
        for _ in loads:
            # One that fails before says why below.
            under_way.acquire(timeout=PATIENCE)
        cluster.deploy(tiny=f"tiny@{new[:12]}")
        for each in loads:
            each.result()


def test_a_replica_that_is_killed_loses_nothing_that_a_retry_cannot_recover(cluster):
    expected = {case: ask(cluster.client, *case).json() for case in CASES}
    answered = threading.Semaphore(0)

    def load(client: Client, seed: int) -> None:
        for case in random.Random(seed).choices(CASES, k=60):
            index, rate, compensate = case
            answer = client.classify(PICTURES[index], rate=rate, compensate=compensate, logits=True)
            assert answer.logits == pytest.approx(expected[case]["logits"], abs=1e-4)
            assert answer.bank_digest == expected[case]["bank_digest"]
            answered.release()

    with (
        Client(str(cluster.client.base_url), retries=9) as client,
        ThreadPoolExecutor(4) as pool,
    ):
        loads = [pool.submit(load, client, seed) for seed in range(4)]
        for _ in range(20):
            assert answered.acquire(timeout=PATIENCE)
        os.kill(cluster.replica(), signal.SIGKILL)
        for each in loads:
            each.result()
