"""The benchmarks' programs start, and what they make of measurements is right."""

import argparse
import asyncio
import importlib
import io
import json
import math
import re
import threading
from collections import Counter
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from fastapi.testclient import TestClient
from PIL import Image

from benchmarks import (
    estimates,
    gpu,
    serve_soak,
    serve_swap,
    serve_throughput,
    subject,
)
from benchmarks.jpeg_scale import enlarged
from benchmarks.load import (
    Exchange,
    Step,
    closed_loop,
    form,
    open_loop,
    poisson_plan,
    run_loop,
    upload,
)
from benchmarks.peers import servers
from benchmarks.studies import distill
from server.settings import BUNDLED_MODEL

FOLDER = Path(__file__).parent.parent / "benchmarks"
PROGRAMS = sorted(
    ".".join(path.relative_to(FOLDER).with_suffix("").parts)
    for path in FOLDER.rglob("*.py")
    if "def main(" in path.read_text()
)


@pytest.mark.parametrize("name", PROGRAMS)
def test_programs_say_how_they_are_used(name, capsys):
    if name == "peers.with_litserve" and find_spec("litserve") is None:
        pytest.skip("litserve is not installed")
    module = importlib.import_module(f"benchmarks.{name}")
    with pytest.raises(SystemExit, match="0"):
        module.main(["--help"])
    # argparse breaks lines where it likes.
    assert module.__doc__.splitlines()[0].split()[:4] <= capsys.readouterr().out.split()


STEPS = [Step(50, 20), Step(50, 80), Step(50, 20)]


def test_a_poisson_plan_is_the_seed_s():
    assert poisson_plan(STEPS, 1) == poisson_plan(STEPS, 1)
    assert poisson_plan(STEPS, 1) != poisson_plan(STEPS, 2)


@pytest.mark.parametrize("seed", range(5))
def test_a_poisson_plan_offers_what_its_steps_say(seed):
    plan = np.array(poisson_plan(STEPS, seed))
    assert (np.diff(plan) > 0).all()
    for number, step in enumerate(STEPS):
        count = ((plan >= 50 * number) & (plan < 50 * (number + 1))).sum()
        expected = step.rate * step.seconds
        assert abs(count - expected) < 5 * math.sqrt(expected)
    gaps = np.diff(plan[plan < 50])
    assert gaps.std() == pytest.approx(gaps.mean(), rel=0.2)  # of exponential gaps they are equal


def test_spread_names_median_and_bounds():
    assert estimates.spread([1, 3, 2]) == "2.00 (1.00 to 3.00)"
    assert estimates.spread([1.25], ".1f") == "1.2"


def test_no_one_is_always_first():
    assert [estimates.in_turn("abc", turn) for turn in range(-1, 2)] == [
        ["c", "b", "a"],
        ["a", "b", "c"],
        ["c", "b", "a"],
    ]


def test_ratios_are_of_neighbours():
    assert estimates.ratios([2, 9], [1, 3]) == [2, 3]
    with pytest.raises(ValueError, match="shorter"):
        estimates.ratios([1, 2], [1])


def test_percentiles_go_along_the_last_axis():
    values = np.arange(101.0)
    assert estimates.percentile(99)(values) == 99
    assert estimates.percentile(50)(np.stack([values, values + 1])).tolist() == [50, 51]


def test_an_interval_surrounds_the_mean_and_narrows_with_more():
    noise = np.random.default_rng(0).normal(5, 1, 10_000)
    low, high = estimates.interval(noise, estimates.mean)
    assert low < 5 < high
    assert high - low == pytest.approx(4 * 1 / 100, rel=0.3)
    few = estimates.interval(noise[:400], estimates.mean)
    assert few[1] - few[0] > 3 * (high - low)
    assert estimates.interval([3.0] * 20, estimates.percentile(99)) == (3.0, 3.0)


def test_an_interval_of_what_comes_in_runs_is_wider():
    runs = np.repeat(np.random.default_rng(0).normal(0, 1, 100), 50)
    low, high = estimates.interval(runs, estimates.mean, block=50)
    shuffled = np.random.default_rng(1).permutation(runs)
    narrow = estimates.interval(shuffled, estimates.mean, block=50)
    assert high - low > 3 * (narrow[1] - narrow[0])


def test_a_slope_is_that_of_the_line():
    assert estimates.slope([0, 1, 2, 3], [1, 3, 5, 7]) == (pytest.approx(2), pytest.approx(0))
    found, error = estimates.slope(range(100), np.random.default_rng(0).normal(0, 1, 100))
    assert abs(found) < 3 * error


def test_a_table_is_markdown():
    assert estimates.markdown(["a", "b"], [[1, "x"]]) == "| a | b |\n| --- | --- |\n| 1 | x |"


async def _answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Be a server: repeat the path; close in the middle if it is /lost."""
    try:
        while head := await reader.readuntil(b"\r\n\r\n"):
            length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
            body = await reader.readexactly(length)
            path = head.split()[1]
            if path == b"/lost":
                break
            answer = json.dumps({"path": path.decode(), "bytes": len(body)}).encode()
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(answer) + answer)
    except asyncio.IncompleteReadError:
        pass
    finally:
        writer.close()


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    loop = asyncio.new_event_loop()
    server = loop.run_until_complete(asyncio.start_server(_answer, "127.0.0.1", 0))
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    yield server.sockets[0].getsockname()[1]

    async def end() -> None:
        server.close()
        waiting = asyncio.all_tasks() - {asyncio.current_task()}
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)

    asyncio.run_coroutine_threadsafe(end(), loop).result()
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


def test_a_closed_loop_asks_everything_once(port):
    requests = [upload(f"/{number}", form(b"x" * number)) for number in range(40)]
    exchanges = closed_loop(port, requests, concurrency=4)
    assert {each.status for each in exchanges} == {200}
    assert {each.json()["path"] for each in exchanges} == {f"/{number}" for number in range(40)}
    sizes = {each.json()["path"]: each.json()["bytes"] for each in exchanges}
    assert sizes["/39"] - sizes["/0"] == 39
    assert all(each.sent < each.done for each in exchanges)


def test_an_open_loop_sends_no_sooner_than_planned(port):
    plan = [0.0, 0.01, 0.02]
    asked = [upload(f"/{number}", form(b"")) for number in range(3)]
    exchanges = run_loop(open_loop(port, plan, asked))
    assert [each.planned for each in exchanges] == plan
    assert [each.json()["path"] for each in exchanges] == ["/0", "/1", "/2"]
    assert all(each.sent >= each.planned for each in exchanges)


def test_an_open_loop_ends_when_it_is_told_to(port):
    async def stopped() -> list[Exchange]:
        stop = asyncio.Event()
        stop.set()
        return await open_loop(port, [0.0], [upload("/", form(b""))], stop)

    assert run_loop(stopped()) == []


def test_a_request_without_an_answer_has_no_status(port):
    exchanges = closed_loop(port, [upload("/lost", form(b"")), upload("/", form(b""))], 1)
    assert [each.status for each in exchanges] == [0, 200]
    assert b"IncompleteRead" in exchanges[0].body


def answered(**answer) -> Exchange:
    return Exchange(0.0, 0.0, 1.0, 200, json.dumps(answer).encode())


def test_batches_are_told_from_answers():
    exchanges = [answered(rate=0, batch_size=4)] * 8 + [answered(rate=8, batch_size=1)] * 2
    assert serve_throughput.batch_sizes(exchanges) == [(0, 4), (0, 4), (8, 1), (8, 1)]


def test_a_measurement_with_errors_is_none():
    late = [Exchange(0, 0.5, 2.5, 200, b""), Exchange(0, 1.0, 3.5, 200, b"")]
    assert serve_throughput.elapsed(late) == 3.0
    with pytest.raises(RuntimeError, match="1 of 3 requests were not answered, e.g. 503"):
        serve_throughput.elapsed([*late, Exchange(0, 0, 1, 503, b"full")])


def test_answers_are_held_against_their_own_bank():
    def offline(question: serve_swap.Question) -> tuple[torch.Tensor, bool]:
        value = {"a" * 8: 1.0, None: 0.0}[question.digest]
        return torch.tensor([value, question.rate]), question.picture == 1

    said = {"bank_digest": "a" * 8, "compensate": True, "rate": 8}
    exchanges = [
        answered(**said, logits=[1.0, 8.0]),
        answered(**{**said, "compensate": False}, logits=[0.0, 8.0]),
        answered(**said, logits=[0.0, 8.0]),  # another bank's
        answered(**said, logits=[0.9, 8.0]),  # of picture 1, whose merging was a close decision
        Exchange(0, 0, 1, 503, b""),
    ]
    found = serve_swap.judge(exchanges, [0, 0, 0, 1, 0], offline)
    assert found.answers == {"as offline": 2, "other": 1, "ties": 1, "status 503": 1}
    assert found.banks == {"a" * 8: 4}


def test_offline_a_bank_gives_what_the_server_gives():
    what = subject.from_arguments(argparse.Namespace(
        backbone=BUNDLED_MODEL.backbone, architecture=None, bank=BUNDLED_MODEL.bank, pictures=None
    ))  # fmt: skip
    model = what.load()
    banks = serve_swap.variants(model.bank)
    offline = serve_swap.Offline(model, banks, what.pictures[:1])
    for bank in (None, *banks[1:]):
        work = model.with_bank(bank).at(model.max_rate, compensate=True)
        digest = work.model.bank_digest
        logits, _ = offline(serve_swap.Question(digest, model.max_rate, 0))
        (served,) = work(offline.images[0])
        torch.testing.assert_close(logits, served.logits, rtol=0, atol=serve_swap.SAME)
    assert offline.least_difference() > 10 * serve_swap.SAME


def test_a_soak_tells_overload_from_faults():
    found = serve_soak.Found()
    ask = serve_soak.Ask("form", "/", {})
    for status in (200, 503, 504, 500, 422, 0):
        found.add(ask, status, "text")
    assert [text.split()[1] for text in found.wrong] == ["500", "422", "0"]
    leaves = serve_soak.Ask("leaves", "/", {}, ())
    found.add(leaves, 0, "")
    found.add(leaves, 500, "")
    assert len(found.wrong) == 4


def test_a_soak_without_readings_is_none():
    class Gone:
        url = "http://127.0.0.1:9"

        def memory(self) -> float:
            raise FileNotFoundError("there is no such process")

    with pytest.raises(FileNotFoundError, match="no such process"):
        asyncio.run(serve_soak.soak(Gone(), None, seconds=0, clients=1))


def test_a_soak_asks_for_everything():
    traffic = serve_soak.Traffic([jpeg(8, 8)], highest=16, seed=0)
    asks = [traffic.next() for _ in range(3000)]
    assert {ask.allowed for ask in asks if "deadline_ms" in ask.target} == {(200, 422)}
    asked = Counter(ask.kind for ask in asks)
    good = {"form", "body", "several", "base64", "features", "stream", "state", "OpenAI",
            "Hugging Face"}  # fmt: skip
    assert good < asked.keys()
    bad = sum(count for kind, count in asked.items() if kind not in good)
    assert bad / 3000 == pytest.approx(serve_soak.BAD, abs=0.03)
    assert len(asked) == len(good) + 10


def jpeg(width: int, height: int) -> bytes:
    written = io.BytesIO()
    Image.new("RGB", (width, height), "teal").save(written, "JPEG")
    return written.getvalue()


def test_pictures_are_enlarged():
    with Image.open(io.BytesIO(enlarged(jpeg(20, 10), factor=6, quality=90))) as large:
        assert large.format == "JPEG"
        assert large.size == (120, 60)


class Lengths:
    """A model that says how many bytes it was given."""

    def prepare(self, data: bytes) -> torch.Tensor:
        return torch.tensor([float(len(data))])

    def run(self, images: torch.Tensor) -> torch.Tensor:
        return images

    def describe(self, logits: torch.Tensor) -> dict[str, float]:
        return {"bytes": logits.item()}


@pytest.mark.parametrize(
    "app",
    [servers.plain(Lengths()), servers.batching(Lengths(), 4, 0.001, 2)],
    ids=["plain", "batching"],
)
def test_peers_answer_each_image_with_its_own(app):
    with TestClient(app) as client:
        assert client.get("/health").status_code == 200
        for length in (1, 5, 1000):
            answer = client.post(servers.PATH, files={"file": b"x" * length})
            assert answer.json() == {"bytes": length}


def test_sizes_in_a_channel_are_those_of_a_mask():
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 3, 7, 16)
    size = torch.randint(1, 9, (2, 7)).float()
    mask = gpu.with_mask(q, k, v, size)
    torch.testing.assert_close(gpu.with_channels(q, k, v, size), mask, rtol=1e-4, atol=1e-5)


def test_all_figures_of_a_device_come_from_one_program(capsys):
    gpu.main(
        ["--device", "cpu", "--precision", "fp32", "--models", "test_vit", "--rates", "0", "8",
         "--batches", "1", "2", "--batch", "4", "--rounds", "1", "--workers", "0"]
    )  # fmt: skip
    said = capsys.readouterr().out
    parts = ["Forwards:", "Attention of 2 images", "Switching", "Fine-tuning", "Distillation:"]
    assert [part for part in parts if part not in said] == []
    assert re.search(r"^\| 1 \| 8 \| eager \|", said, re.MULTILINE)
    assert re.search(r"^\| adaptformer \| 0 \| \d+ \|", said, re.MULTILINE)
    assert re.search(r"The step on cpu, fp32: [\d.]+ pictures/s", said)


def test_switching_needs_two_rates(capsys):
    with pytest.raises(SystemExit, match="2"):
        gpu.main(["--device", "cpu", "--rates", "8"])
    assert "--rates needs two or more" in capsys.readouterr().err


def test_arms_of_a_study_are_added_to_those_of_others(tmp_path):
    path = tmp_path / "study.json"
    distill.added([{"arm": "rank 4", "seed": 0, "kl": 1}, {"arm": "rank 1", "seed": 0}], path)
    found = distill.added([{"arm": "rank 4", "seed": 0, "kl": 2}], path)
    assert found == [{"arm": "rank 1", "seed": 0}, {"arm": "rank 4", "seed": 0, "kl": 2}]
    assert json.loads(path.read_text()) == found


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_figures_of_a_gpu_need_one(capsys):
    with pytest.raises(SystemExit, match="2"):
        gpu.main([])
    assert "there is no GPU here; --device cpu" in capsys.readouterr().err
