"""How a server fares beside busy programs: latency of single requests and throughput.

    python -m benchmarks.serve_neighbours

A server with graphs and one without, each alone and beside busy loops. The states take turns, so
that a machine whose speed drifts does so for all, and the server that is not asked is stopped. What
counts is the ratio to the server alone.
"""

import argparse
import itertools
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from benchmarks import machine
from benchmarks.estimates import in_turn, markdown, ratios, spread
from benchmarks.load import Exchange, Request, closed_loop, form, upload
from benchmarks.served import Served, serving, stopped

SAMPLES = Path(__file__).parent.parent / "tocom" / "bundled" / "samples"
#: Requests at a time where throughput is measured.
MANY = 16
MODES = {"with graphs": {}, "without graphs": {"max_graphs": 0}}


@contextmanager
def neighbours(count: int) -> Iterator[None]:
    """Keep as many processors busy as there are loops, until the end of the block."""
    busy = [sys.executable, "-c", "while True: pass"]
    loops = [subprocess.Popen(busy, start_new_session=True) for _ in range(count)]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


@contextmanager
def alone(servers: Mapping[str, Served], mode: str) -> Iterator[int]:
    """Stop all servers but one until the end of the block; return the port of that one."""
    with ExitStack() as stack:
        for name, served in servers.items():
            if name != mode:
                stack.enter_context(stopped(served.process))
        yield servers[mode].port


def requests(rate: int, seconds: float) -> Iterator[Request]:
    """Yield requests with the sample photographs until the time is over."""
    bodies = [form(path.read_bytes()) for path in sorted(SAMPLES.glob("*.jpg"))]
    end = time.monotonic() + seconds
    for body in itertools.cycle(bodies):
        if time.monotonic() > end:
            return
        yield upload(f"/v1/classify?rate={rate}", body)


def measure(port: int, rate: int, seconds: float) -> tuple[float, float]:
    """Return the median latency of single requests, in ms, and the answers a second to many."""

    def ask(concurrency: int) -> list[Exchange]:
        done = closed_loop(port, requests(rate, seconds), concurrency)
        if wrong := [each for each in done if each.status != 200]:
            raise RuntimeError(f"{len(wrong)} of {len(done)} failed: {wrong[0].body[:200]!r}")
        return done

    single, many = ask(1), ask(MANY)
    latency = statistics.median(each.done - each.sent for each in single)
    return 1000 * latency, len(many) / max(each.done for each in many)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--neighbours", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rate", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--settling", type=float, default=40.0,
                        help="seconds in which a server compiles what it will")  # fmt: skip
    options = parser.parse_args(argv)
    counts = sorted({0, *options.neighbours})
    found: dict[tuple[str, int], list[tuple[float, float]]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        log = Path(folder) / "server.log"
        servers = {
            mode: stack.enter_context(serving(log, log_level="warning", **settings))
            for mode, settings in MODES.items()
        }
        for mode in servers:
            with alone(servers, mode) as port:
                measure(port, options.rate, options.settling / 2)
        for turn in range(options.rounds):
            for mode, count in in_turn(itertools.product(servers, counts), turn):
                with alone(servers, mode) as port, neighbours(count):
                    found[mode, count].append(measure(port, options.rate, options.seconds))
    rows = []
    for mode, count in itertools.product(MODES, counts):
        latencies, rates = zip(*found[mode, count], strict=True)
        latencies_alone, rates_alone = zip(*found[mode, 0], strict=True)
        rows.append(
            [mode, count, spread(latencies, ".1f"), spread(ratios(latencies, latencies_alone)),
             spread(rates, ".1f"), spread(ratios(rates, rates_alone))]
        )  # fmt: skip
    print(f"{machine.describe()}.\n")
    header = ["server", "neighbours", "p50, ms", "of alone", "images a second", "of alone"]
    print(markdown(header, rows))


if __name__ == "__main__":
    main()
