"""Two replicas under Ray, as they are used: a program, HTTP, and the program again to change them."""

import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
import pytest
import torch

from adapters import Bank, Store
from tests.server.conftest import MAX_RATE, picture, png

ROOT = Path(__file__).parents[2]
KEY = "admin-" + "k" * 16
PICTURES = [png(picture(seed)) for seed in range(4)]
CASES = [
    (index, rate, compensate)
    for index in range(len(PICTURES))
    for rate in range(MAX_RATE + 1)
    for compensate in (True, False)
]


@dataclass(frozen=True)
class Cluster:
    """A program that runs, and how to run it again for the same cluster."""

    program: subprocess.Popen[str]
    command: list[str]
    environment: dict[str, str]
    client: httpx.Client

    def change(self, *arguments: str) -> None:
        """Ask the running cluster for the same with other arguments."""
        command = [*self.command, "--address", "auto", *arguments]
        done = subprocess.run(
            command, env=self.environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr

    def workers(self) -> dict[int, str]:
        """Return the replicas' processes: their ids and names."""
        found = psutil.Process(self.program.pid).children(recursive=True)
        names = {process.pid: " ".join(process.cmdline()) for process in found}
        return {pid: name for pid, name in names.items() if name.startswith("ray::ServeReplica")}


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
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "server.ray", "--config", str(folder / "server.toml")]
    command += ["--port", str(port), "--replicas", "2", "--cpus", "0.5"]
    # A socket's path has to be short.
    with (
        tempfile.TemporaryDirectory(prefix="ray-") as ray_folder,
        (folder / "log").open("w+") as log,
        httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client,
    ):
        # Ray keeps a token at home.
        ours = {"HOME": str(folder), "PYTHONPATH": str(ROOT), "RAY_TMPDIR": ray_folder}
        environment = os.environ | ours
        with subprocess.Popen(
            command, env=environment, cwd=folder, stdout=subprocess.PIPE, stderr=log, text=True
        ) as program:
            try:
                greeting = ""
                while "Serving on" not in greeting:
                    greeting = program.stdout.readline()
                    assert greeting, (folder / "log").read_text()
                yield Cluster(program, command, environment, client)
                left = psutil.Process(program.pid).children(recursive=True)
                program.send_signal(signal.SIGINT)
                assert program.wait(timeout=120) == 0
                assert psutil.wait_procs(left, timeout=60)[1] == []
            finally:
                program.kill()


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
    shares = Counter(answer.headers["x-replica"] for answer in answers)
    assert len(shares) == 2


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
        cluster.change("--bank", f"tiny=tiny@{new[:12]}")
        changed = len(seen)
        while len(seen) < changed + 40:
            time.sleep(0.01)
        done.set()
        for each in loads:
            each.result()

    assert {digest for _, digest in seen[:changed]} == {old, new}
    # Those that were on their way when the change was done may have begun before it.
    after = seen[changed + 4 :]
    assert {digest for _, digest in after} == {new}
    # The replicas are those of before: none was started for it.
    assert len({replica for replica, _ in seen}) == len({replica for replica, _ in after}) == 2


def test_a_replica_that_is_killed_loses_nothing_that_a_retry_cannot_recover(cluster, other_bank):
    expected = {case: ask(cluster.client, *case).json()["logits"] for case in CASES}
    before = {ask(cluster.client, 0, 0, True).headers["x-replica"] for _ in range(20)}
    killed = threading.Event()
    replicas: list[str] = []

    def insist(case: tuple[int, int, bool]) -> None:
        for attempt in range(100):
            try:
                answer = ask(cluster.client, *case)
            except httpx.TransportError:
                continue
            if answer.status_code < 500:
                break
            time.sleep(0.1)
        assert answer.status_code == 200
        body = answer.json()
        assert body["bank_digest"] == other_bank.info.digest
        assert body["logits"] == pytest.approx(expected[case], abs=1e-4)
        replicas.append(answer.headers["x-replica"])

    def load(seed: int) -> None:
        cases = random.Random(seed)
        # Until the one that takes its place has answered.
        while len(replicas) < 100 or set(replicas) <= before:
            insist(cases.choice(CASES))

    with ThreadPoolExecutor(8) as pool:
        loads = [pool.submit(load, seed) for seed in range(8)]
        while len(replicas) < 20:
            time.sleep(0.01)
        os.kill(min(cluster.workers()), signal.SIGKILL)
        killed.set()
        for each in loads:
            each.result()
