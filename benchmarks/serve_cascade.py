"""What `rate=cascade` gives over HTTP at saturation beside rate 0, and what a kept answer takes.

    python -m benchmarks.serve_cascade --pictures eval.tar

Every picture is asked about once at rate 0 and once for each agreement, in turns, by as many
clients as keep the server busy. Answers are held against those of rate 0. Then a server that keeps
answers is asked about each picture twice in a row, one at a time: the second answer is a kept one.
Forwards are not compiled unless it is asked for.
"""

import argparse
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks import machine, subject
from benchmarks.estimates import in_turn, markdown, ratios, spread
from benchmarks.load import Exchange, closed_loop, form, upload
from benchmarks.serve_throughput import elapsed
from benchmarks.served import Served, serving
from benchmarks.subject import Subject

#: Bytes of answers that are kept: enough for all pictures.
CACHE = 256 * 2**20


def ask(served: Served, query: str, forms: Sequence[bytes], concurrency: int) -> list[Exchange]:
    """Ask about every picture once; return the answers in the pictures' order."""
    asked = (upload(f"/v1/classify?{query}", body) for body in forms)
    return closed_loop(served.port, asked, concurrency)


def said(exchanges: Sequence[Exchange]) -> list[int]:
    """Return the classes that were answered."""
    return [each.json()["predictions"][0]["index"] for each in exchanges]


def throughput(served: Served, forms: Sequence[bytes], options: argparse.Namespace) -> str:
    """Return a table of images a second, in turns."""
    queries = {"rate 0": "rate=0"}
    for agreement in options.agreements:
        queries[f"cascade, agreement {agreement:g}"] = f"rate=cascade&agreement={agreement:g}"
    for query in queries.values():
        elapsed(ask(served, query, forms[: options.concurrency], options.concurrency))  # warms
    pace: dict[str, list[float]] = {name: [] for name in queries}
    answers: dict[str, list[Exchange]] = {}
    for turn in range(options.rounds):
        for name, query in in_turn(queries.items(), turn):
            answers[name] = ask(served, query, forms, options.concurrency)
            pace[name].append(len(forms) / elapsed(answers[name]))
    stock = said(answers["rate 0"])
    rows = []
    for name, exchanges in answers.items():
        same = sum(map(int.__eq__, said(exchanges), stock)) / len(stock)
        share = statistics.mean(each.json()["macs_ratio"] for each in exchanges)
        rows.append([name, spread(pace[name], ".1f"), spread(ratios(pace[name], pace["rate 0"])),
                     f"{share:.3f}", f"{100 * same:.1f}"])  # fmt: skip
    header = ["requests at", "images/s", "over rate 0", "share of multiply-adds", "as rate 0, %"]
    return markdown(header, rows)


def kept(served: Served, pictures: Sequence[bytes], rounds: int) -> str:
    """Return a table of the milliseconds that a lone request takes, with and without a run."""
    found: dict[str, list[tuple[float, float]]] = {"run": [], "kept": []}
    for turn in range(rounds):
        # Bytes behind its end make a picture new to the server, and change nothing else.
        twice = [form(picture + bytes(turn)) for picture in pictures for _ in range(2)]
        exchanges = ask(served, "rate=0", twice, 1)
        elapsed(exchanges)  # all were answered
        for name, asked in zip(found, (exchanges[::2], exchanges[1::2]), strict=True):
            if any(each.json()["cached"] != (name == "kept") for each in asked):
                raise RuntimeError("answers were not kept as they should be")
            times = sorted(1000 * (each.done - each.sent) for each in asked)
            p99 = times[int(0.99 * (len(times) - 1))]
            found[name].append((statistics.median(times), p99))
    rows = [
        [name, *(spread(each) for each in zip(*times, strict=True))]
        for name, times in found.items()
    ]
    return markdown(["answer", "p50, ms", "p99, ms"], rows)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print Markdown tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    subject.add_arguments(parser)
    parser.add_argument("--agreements", type=float, nargs="+", default=[0.99, 0.97])
    parser.add_argument("--concurrency", type=int, default=64, help="requests at once")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--kept", type=int, default=100, help="pictures asked about twice")
    parser.add_argument("--max-graphs", type=int, default=0, help="forwards that are compiled")
    options = parser.parse_args(argv)
    what = subject.from_arguments(options)
    print(measure(what, options))


def measure(what: Subject, options: argparse.Namespace) -> str:
    """Return all that is found."""
    forms = [form(picture) for picture in what.pictures]
    given = {"models": what.served, "max_graphs": options.max_graphs}
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        with serving(log, **given) as served:
            table = throughput(served, forms, options)
        with serving(log, cache_bytes=CACHE, **given) as served:
            times = kept(served, what.pictures[: options.kept], options.rounds)
    return (
        f"{machine.describe()}.\n\n{what.described}; {options.concurrency} requests at once, "
        f"{options.rounds} rounds.\n\n{table}\n\nOne request at a time:\n\n{times}\n"
    )


if __name__ == "__main__":
    main()
