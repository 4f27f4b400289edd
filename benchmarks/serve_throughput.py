"""What HTTP, batching and mixed rates cost: a saturated server against the same work without one.

    python -m benchmarks.serve_throughput --pictures eval.tar

The server is a `tocom-serve` process as it is installed, with its default settings. Beside it the
same images are decoded, transformed and run in this process, with as many decoders and torch
threads and, for each measurement, in the batches that the server has just made, to their rate and
size. Both take turns; ratios are of neighbours in time. CPU time is what the processor counted
for the server's threads and for this process while it was only the client.

Other ways to serve the model (`benchmarks/peers`) take turns with ours likewise, each at one rate,
for a few seconds at a time; who does not work is stopped. Each is tried with several settings at
rate 0, and the best of each kind counts.
"""

import argparse
import itertools
import random
import statistics
import sys
import tempfile
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

import torch

from benchmarks import machine, subject
from benchmarks.estimates import in_turn, markdown, ratios, spread
from benchmarks.load import Exchange, Request, closed_loop, form, upload
from benchmarks.served import Served, free_port, running, serving, stopped
from benchmarks.subject import Subject
from server.engine.threads import begin_beside_forwards
from server.models.pictures import prepare
from server.models.served import ServedModel
from server.settings import Settings
from tocom.allocator import keep_freed_memory

#: The parts that CPU time goes to.
PARTS = ("decode", "forward", "HTTP", "other", "client")
#: Seconds before a lone image, in which the threads of the one before fall asleep.
REST = 0.05
#: Rounds in which settings of peers are tried.
TRIES = 3
#: Settings of each kind of peer that are tried.
PEERS: dict[str, list[dict[str, float]]] = {
    "plain": [{}],
    "batching": [{"max_batch": 8, "timeout": 0.005}, {"max_batch": 16, "timeout": 0.02}],
    "litserve": [
        {"max_batch": 1, "timeout": 0.0, "workers": 1},
        {"max_batch": 8, "timeout": 0.005, "workers": 1},
        {"max_batch": 16, "timeout": 0.02, "workers": 1},
        {"max_batch": 1, "timeout": 0.0, "workers": 2},
        {"max_batch": 8, "timeout": 0.02, "workers": 2},
        {"max_batch": 16, "timeout": 0.02, "workers": 2},
    ],
}

Batch = tuple[int, list[bytes]]


@dataclass
class Measured:
    """Images a second of one load, by HTTP and without, and where the CPU time went."""

    http: list[float] = field(default_factory=list)
    alone: list[float] = field(default_factory=list)
    batch: list[float] = field(default_factory=list)
    cpu: Counter[str] = field(default_factory=Counter)
    images: int = 0
    seconds: float = 0.0


class Pipeline:
    """Decoding in a pool, the forward in this thread, nothing else."""

    def __init__(self, model: ServedModel, settings: Settings) -> None:
        self.model, self.settings = model, settings
        self.pool = ThreadPoolExecutor(settings.decode_threads, initializer=begin_beside_forwards)

    def run(self, batches: Sequence[Batch], ahead: int) -> float:
        """Run batches of (rate, images) and return the images a second.

        Args:
            batches: what to run.
            ahead: images that are decoded or being decoded before their turn.
        """
        began = time.perf_counter()
        pictures = itertools.chain.from_iterable(images for _, images in batches)
        coming = (self.pool.submit(self._prepare, picture) for picture in pictures)
        ready = deque(itertools.islice(coming, ahead))
        images = 0
        with torch.inference_mode():
            for rate, batch in batches:
                ready.extend(itertools.islice(coming, len(batch)))
                stacked = torch.stack([ready.popleft().result() for _ in batch])
                self.model.at(rate, compensate=True)(stacked)
                images += len(batch)
        return images / (time.perf_counter() - began)

    def single(self, picture: bytes, rate: int) -> float:
        """Return the seconds that one image takes by itself."""
        began = time.perf_counter()
        with torch.inference_mode():
            self.model.at(rate, compensate=True)(self._prepare(picture)[None])
        return time.perf_counter() - began

    def _prepare(self, picture: bytes) -> torch.Tensor:
        return prepare(picture, self.model, self.settings)


class Bench:
    """A server, a pipeline and what both are given."""

    def __init__(self, what: Subject, served: Served, arguments: argparse.Namespace) -> None:
        settings = Settings(models=(what.settings,))
        self.served = served
        self.pictures = what.pictures
        self.forms = [form(picture) for picture in what.pictures]
        self.pipeline = Pipeline(what.load(), settings)
        self.highest = self.pipeline.model.max_rate
        self.measured = sorted({0, (self.highest + 1) // 2, self.highest})
        self.images: int = arguments.images
        self.concurrency: int = arguments.concurrency
        self._chance = random.Random(0)

    def rates(self, load: str) -> list[int]:
        """Return the rate of each image of a load: `mix`, `sorted` or a rate."""
        if load not in ("mix", "sorted"):
            return [int(load)] * self.images
        rates = [image % (self.highest + 1) for image in range(self.images)]
        if load == "sorted":
            return sorted(rates)
        self._chance.shuffle(rates)
        return rates

    def requests(self, rates: Sequence[int]) -> Iterator[Request]:
        """Yield a request for each rate, with pictures in turn."""
        for rate, body in zip(rates, itertools.cycle(self.forms), strict=False):
            yield upload(f"/v1/classify?rate={rate}", body)

    def alternately(self, rate: int, count: int, alone: list[float]) -> Iterator[Request]:
        """Yield requests; before each of them its picture is run here, for so many seconds.

        Both find all threads asleep: those of a forward wait awake for a while after it.
        """
        asked = zip(self.requests([rate] * count), itertools.cycle(self.pictures), strict=False)
        for request, picture in asked:
            time.sleep(REST)
            alone.append(self.pipeline.single(picture, rate))
            time.sleep(REST)
            yield request

    def by_http(self, load: str, measured: Measured) -> list[Batch]:
        """Measure a load by HTTP and return the batches that the server made of it."""
        before, client = self.served.cpu(), time.process_time()
        exchanges = closed_loop(self.served.port, self.requests(self.rates(load)), self.concurrency)
        measured.cpu += self.served.cpu() - before
        measured.cpu["client"] += time.process_time() - client
        seconds = elapsed(exchanges)
        measured.seconds += seconds
        measured.images += len(exchanges)
        measured.http.append(len(exchanges) / seconds)
        sizes = batch_sizes(exchanges)
        measured.batch.append(len(exchanges) / len(sizes))
        self._chance.shuffle(sizes)
        pictures = itertools.cycle(self.pictures)
        return [(rate, list(itertools.islice(pictures, size))) for rate, size in sizes]


def elapsed(exchanges: Sequence[Exchange]) -> float:
    """Return the seconds from the first request to the last answer, which must all be 200."""
    if wrong := [each for each in exchanges if each.status != 200]:
        raise RuntimeError(
            f"{len(wrong)} of {len(exchanges)} requests were not answered, e.g. "
            f"{wrong[0].status}: {wrong[0].body[:500]!r}"
        )
    return max(each.done for each in exchanges) - min(each.sent for each in exchanges)


def batch_sizes(exchanges: Sequence[Exchange]) -> list[tuple[int, int]]:
    """Return (rate, images) of the batches that a server made, from what its answers say."""
    images = Counter(
        (answer["rate"], answer["batch_size"]) for answer in (each.json() for each in exchanges)
    )
    return [key for key, count in sorted(images.items()) for _ in range(round(count / key[1]))]


def throughput(bench: Bench, rounds: int) -> None:
    """Print images a second of each load, and where the CPU time went."""
    loads = [*map(str, bench.measured), "mix", "sorted"]
    found = {load: Measured() for load in loads}
    bench.by_http("mix", Measured())  # warms what the server's own warming does not reach
    bench.pipeline.run([(rate, bench.pictures[:1]) for rate in range(bench.highest + 1)], 1)
    for _ in range(rounds):
        for load in loads:
            batches = bench.by_http(load, found[load])
            if load != "sorted":
                found[load].alone.append(bench.pipeline.run(batches, bench.concurrency))
    rows = [
        [name_of(load), spread(each.http, ".1f"), spread(each.alone, ".1f"),
         spread(ratios(each.http, each.alone)), f"{statistics.mean(each.batch):.1f}"]
        for load, each in found.items() if each.alone
    ]  # fmt: skip
    header = ["rate", "HTTP, images/s", "without, images/s", "ratio", "images a batch"]
    print(f"\n{markdown(header, rows)}\n", flush=True)
    mixing = ratios(found["mix"].http, found["sorted"].http)
    print(f"Mixed rates against the same requests sorted by rate: {spread(mixing)}.\n")
    rows = [
        [name_of(load), *(f"{100 * each.cpu[part] / each.cpu.total():.0f} %" for part in PARTS),
         f"{1000 * each.cpu.total() / each.images:.1f}", f"{each.cpu.total() / each.seconds:.2f}"]
        for load, each in found.items()
    ]  # fmt: skip
    header = ["rate", *PARTS, "CPU ms an image", "cores busy"]
    print(f"Where the CPU time went:\n\n{markdown(header, rows)}\n", flush=True)


def name_of(load: str) -> str:
    """Return how tables call a load."""
    return {"mix": "all, mixed", "sorted": "all, sorted"}.get(load, load)


def median_ms(seconds: Sequence[float]) -> float:
    """Return the median in milliseconds."""
    return 1000 * statistics.median(seconds)


def latency(bench: Bench, rounds: int, requests: int) -> None:
    """Print what a server adds to the time of a single image, one at a time."""
    rows = []
    for rate in bench.measured:
        medians: list[tuple[float, float, float]] = []
        for _ in range(rounds):
            alone: list[float] = []
            asked = bench.alternately(rate, requests, alone)
            exchanges = closed_loop(bench.served.port, asked, concurrency=1)
            elapsed(exchanges)  # all were answered
            http = [each.done - each.sent for each in exchanges]
            added = [one - other for one, other in zip(http, alone, strict=True)]
            medians.append((median_ms(http), median_ms(alone), median_ms(added)))
        rows.append([rate, *(spread(each, ".1f") for each in zip(*medians, strict=True))])
    header = ["rate", "HTTP, p50 ms", "decode + forward, p50 ms", "added, ms"]
    print(f"One request at a time:\n\n{markdown(header, rows)}\n", flush=True)


def beside_peers(bench: Bench, what: Subject, kinds: Sequence[str], rounds: int, log: Path) -> None:
    """Print images a second of ours and of others, in turns."""
    rows = []
    for kind in kinds:
        if kind == "litserve" and find_spec("litserve") is None:
            print("LitServe is not installed: pip install litserve\n")
            continue
        tried = {}
        for options in PEERS[kind]:
            name = ", ".join([kind, *(f"{key} {value}" for key, value in options.items())])
            tried[name] = beside(bench, what, kind, options, 0, TRIES, log)
        best = min(tried, key=lambda name: statistics.median(ratios(*tried[name])))
        rows += [[name, 0, *cells(*both)] for name, both in tried.items() if name != best]
        options = PEERS[kind][list(tried).index(best)]
        for rate in bench.measured:
            both = beside(bench, what, kind, options, rate, rounds, log)
            rows.append([f"**{best}**", rate, *cells(*both)])
    header = ["peer", "rate", "ours, images/s", "peer, images/s", "ours / peer"]
    print(f"Beside others; the best of each kind in bold:\n\n{markdown(header, rows)}\n")


def beside(
    bench: Bench,
    what: Subject,
    kind: str,
    options: dict[str, float],
    rate: int,
    rounds: int,
    log: Path,
) -> tuple[list[float], list[float]]:
    """Return images a second of ours and of a peer, in turns: one works while the other cannot."""
    ours, theirs = Measured(), list[float]()
    port, rates = free_port(), bench.rates(str(rate))
    command = command_of(kind, port, what, {"rate": rate, **options})
    with running(command, f"http://127.0.0.1:{port}/health", log) as process:
        closed_loop(port, bench.requests(rates), bench.concurrency)  # warms it

        def by_ours() -> None:
            with stopped(process):
                bench.by_http(str(rate), ours)

        def by_peer() -> None:
            with stopped(bench.served.process):
                exchanges = closed_loop(port, bench.requests(rates), bench.concurrency)
            theirs.append(len(exchanges) / elapsed(exchanges))

        for turn in range(rounds):
            for run in in_turn((by_ours, by_peer), turn):
                run()
    return ours.http, theirs


def command_of(kind: str, port: int, what: Subject, options: dict[str, float]) -> list[str]:
    """Return the command that starts a peer."""
    module = "with_litserve" if kind == "litserve" else "servers"
    given = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    program = [sys.executable, "-m", f"benchmarks.peers.{module}"]
    return [*program, kind, str(port), what.settings.model_dump_json(), *given]


def cells(ours: list[float], theirs: list[float]) -> list[str]:
    """Return the cells of a row about a peer."""
    return [spread(ours, ".1f"), spread(theirs, ".1f"), spread(ratios(ours, theirs))]


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print Markdown tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    subject.add_arguments(parser)
    parser.add_argument("--images", type=int, default=340, help="of a measurement")
    parser.add_argument("--concurrency", type=int, default=64, help="requests at once")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--single", type=int, default=40, help="requests one at a time, a round")
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=list(PEERS))
    parser.add_argument("--peer-rounds", type=int, default=10, help="of the best of each kind")
    arguments = parser.parse_args(argv)
    keep_freed_memory()  # as the server does
    what = subject.from_arguments(arguments)
    print(f"{machine.describe()}.\n\n{what.described}; {arguments.images} images a measurement, "
          f"{arguments.concurrency} requests at once, {arguments.rounds} rounds.")  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        # Without graphs: everyone here runs the same forward.
        with serving(log, models=what.served, max_graphs=0) as served:
            bench = Bench(what, served, arguments)
            throughput(bench, arguments.rounds)
            latency(bench, arguments.rounds, arguments.single)
            beside_peers(bench, what, arguments.peers, arguments.peer_rounds, log)


if __name__ == "__main__":
    main()
