"""How a server fares beside busy programs: latency of single requests and throughput.

    python -m benchmarks.serve_neighbours

A server with graphs and one without, each alone and beside busy loops. The states take turns, so
that a machine whose speed drifts does so for all. What counts is the ratio to the server alone.
"""

import argparse
import itertools
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from benchmarks import machine
from benchmarks.estimates import markdown, ratios, spread
from benchmarks.load import Exchange, Request, closed_loop, form, upload
from benchmarks.served import serving

SAMPLES = Path(__file__).parent.parent / "tocom" / "bundled" / "samples"
#: Requests at a time where throughput is measured.
MANY = 16
#: Seconds in which a server compiles what it will, and the rest settles.
SETTLING = 40.0
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
    options = parser.parse_args(argv)
    counts = sorted({0, *options.neighbours})
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for mode, settings in MODES.items():
            found: dict[int, list[tuple[float, float]]] = defaultdict(list)
            with serving(Path(folder) / "server.log", log_level="warning", **settings) as served:
                measure(served.port, options.rate, SETTLING / 2)
                for _, count in itertools.product(range(options.rounds), counts):
                    with neighbours(count):
                        found[count].append(measure(served.port, options.rate, options.seconds))
            alone = list(zip(*found[0], strict=True))
            for count in counts:
                latencies, rates = zip(*found[count], strict=True)
                rows.append(
                    [
                        mode,
                        count,
                        spread(latencies, ".1f"),
                        spread(ratios(latencies, alone[0])),
                        spread(rates, ".1f"),
                        spread(ratios(rates, alone[1])),
                    ]
                )
    print(f"{machine.describe()}.\n")
    header = ["server", "neighbours", "p50, ms", "of alone", "images a second", "of alone"]
    print(markdown(header, rows))


if __name__ == "__main__":
    main()
