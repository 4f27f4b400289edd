"""What `rate=auto` is worth when load comes and goes: the same arrivals for auto and fixed rates.

    python -m benchmarks.serve_elastic --pictures eval.tar --folder runs/elastic

First the capacity at rate 0 and at the highest is measured, by HTTP in a closed loop. Then open
loops, a seeded Poisson process each: 50 % of the capacity at rate 0, a burst of 90 % of that at
the highest rate, and back. Every arm gets the same pictures at the same times from the same
server, each request with the same deadline: auto, fixed rates (whose requests the server refuses
as soon as it knows that it cannot keep the deadline), and auto without the bank.

Times are from when a request was to be sent; those that were refused, late or wrong stay in the
denominator. An arm is void if the client was late itself. Writes `elastic.json`, `.md`, `.svg` and
`.png`.
"""

import argparse
import itertools
import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import machine, subject
from benchmarks.elastic_plot import plot
from benchmarks.estimates import Floats, interval, markdown, mean, percentile
from benchmarks.load import (
    LATE,
    Exchange,
    Step,
    closed_loop,
    first_in_line,
    form,
    open_loop,
    poisson_plan,
    run_loop,
    upload,
)
from benchmarks.served import Served, serving
from benchmarks.subject import Subject

#: Share of the capacity at rate 0 before and after the burst, of that at the highest rate in it.
QUIET, BURST = 0.5, 0.9
#: Seconds for which every answer must be at rate 0 for auto to be back there.
BACK = 1.0


@dataclass(frozen=True)
class Scene:
    """What every arm goes through.

    Attributes:
        steps: before, in and after the burst.
        plan: when each request is sent.
        pictures: which picture it has.
        slo: seconds in which it is to be answered.
        settle: seconds from the beginning of the burst in which auto may still be adjusting.
    """

    steps: tuple[Step, Step, Step]
    plan: list[float]
    pictures: list[int]
    slo: float
    settle: float

    @property
    def burst(self) -> tuple[float, float]:
        """When the burst begins and ends."""
        begins = self.steps[0].seconds
        return begins, begins + self.steps[1].seconds


@dataclass(frozen=True)
class Arm:
    """What became of each request of a scene, in their order.

    Attributes:
        planned, sent, done: seconds since the beginning.
        status: of the answers; 0: there was none.
        rate: that ran; -1 where nothing did.
        correct: whether the class was the picture's.
    """

    planned: Floats
    sent: Floats
    done: Floats
    status: Floats
    rate: Floats
    correct: Floats

    @property
    def latency(self) -> Floats:
        """Seconds from when each was to be sent."""
        return self.done - self.planned


def make_scene(capacities: dict[int, float], pictures: int, options: argparse.Namespace) -> Scene:
    """Plan the arrivals; `capacities` are images a second by rate."""
    quiet, burst = QUIET * capacities[0], BURST * capacities[max(capacities)]
    before, during, after = options.seconds
    steps = Step(before, quiet), Step(during, burst), Step(after, quiet)
    plan = poisson_plan(steps, options.seed)
    chosen = random.Random(options.seed).choices(range(pictures), k=len(plan))
    return Scene(steps, plan, chosen, options.slo_ms / 1000, options.settle)


def capacity(served: Served, forms: Sequence[bytes], rate: int, images: int) -> float:
    """Return the images a second that the server does at a rate."""
    bodies = itertools.islice(itertools.cycle(forms), images)
    asked = (upload(f"/v1/classify?rate={rate}", body) for body in bodies)
    exchanges = closed_loop(served.port, asked, concurrency=64)
    if wrong := [each for each in exchanges if each.status != 200]:
        raise RuntimeError(f"{len(wrong)} requests failed: {wrong[0].status} {wrong[0].body!r}")
    return images / max(each.done for each in exchanges)


def play(served: Served, scene: Scene, query: str, forms: Sequence[bytes]) -> list[Exchange]:
    """Send the scene's requests with a query."""
    asked = (upload(f"/v1/classify?{query}", forms[picture]) for picture in scene.pictures)
    with first_in_line():
        return run_loop(open_loop(served.port, scene.plan, asked))


def read(exchanges: Sequence[Exchange], scene: Scene, classes: Sequence[int] | None) -> Arm:
    """Read the answers."""
    rates, correct = [], []
    for exchange, picture in zip(exchanges, scene.pictures, strict=True):
        answer = exchange.json() if exchange.status == 200 else None
        rates.append(answer["rate"] if answer else -1)
        said = answer["predictions"][0]["index"] if answer else None
        correct.append(classes is not None and said == classes[picture])
    planned, sent, done, status = np.array(
        [(each.planned, each.sent, each.done, each.status) for each in exchanges]
    ).T
    return Arm(planned, sent, done, status, np.array(rates, float), np.array(correct, float))


def figures(arm: Arm, scene: Scene) -> dict[str, Any]:
    """Return what an arm comes to; shares are of all that was offered."""
    ok = arm.status == 200
    in_time = ok & (arm.latency <= scene.slo)
    begins, ends = scene.burst
    burst = (arm.planned >= begins) & (arm.planned < ends)
    settled = ok & ~((arm.planned >= begins) & (arm.planned < begins + scene.settle))
    good = (in_time & (arm.correct > 0)).astype(np.float64)
    late_client = float(np.percentile(arm.sent - arm.planned, 99))
    return {
        "offered": len(ok),
        "refused": int((arm.status == 503).sum()),
        "late": int((ok & ~in_time).sum() + (arm.status == 504).sum()),
        "errors": int((~ok & (arm.status != 503) & (arm.status != 504)).sum()),
        "p50_ms": 1000 * float(np.percentile(arm.latency[ok], 50)),
        **_with_interval("p99_ms", 1000 * arm.latency[ok], percentile(99)),
        **_with_interval("p99_settled_ms", 1000 * arm.latency[settled], percentile(99)),
        "goodput": float(in_time.sum() / sum(step.seconds for step in scene.steps)),
        "goodput_burst": float((in_time & burst).sum() / (ends - begins)),
        **_with_interval("effective_accuracy", 100 * good, mean),
        "accuracy_burst": 100 * float(arm.correct[burst & ok].mean()),
        "rate_burst": float(arm.rate[burst & ok].mean()),
        "client_late_ms": 1000 * late_client,
        "void": late_client > LATE,
    }


def _with_interval(name: str, values: Floats, statistic: Any) -> dict[str, Any]:
    return {name: float(statistic(values)), f"{name}_interval": interval(values, statistic)}


def until_back(arm: Arm, ends: float) -> float | None:
    """Return the seconds from the end of the burst until auto is at rate 0 to stay for `BACK`.

    None: it never was.
    """
    after = (arm.planned >= ends) & (arm.status == 200)
    planned, rates = arm.planned[after], arm.rate[after]
    for start in planned[rates == 0]:
        window = (planned >= start) & (planned < start + BACK)
        if start + BACK <= planned[-1] and not rates[window].any():
            return float(start - ends)
    return None


def series(arm: Arm, scene: Scene) -> dict[str, list[float | None]]:
    """Return what a plot shows, by the second in which requests were to be sent."""
    second = arm.planned.astype(int)
    ok = arm.status == 200
    in_time = ok & (arm.latency <= scene.slo)
    seconds = range(int(sum(step.seconds for step in scene.steps)))

    def each(values: Floats, of: Floats, take: Any) -> list[float | None]:
        chosen = (values[(second == at) & of] for at in seconds)
        return [round(float(take(some)), 4) if len(some) else None for some in chosen]

    return {
        "offered": [int((second == at).sum()) for at in seconds],
        "good": [int(((second == at) & in_time).sum()) for at in seconds],
        "rate": each(arm.rate, ok, np.mean),
        "p50_ms": each(1000 * arm.latency, ok, np.median),
        "worst_ms": each(1000 * arm.latency, ok, np.max),
    }


def ahead(arm: Arm, other: Arm, scene: Scene) -> tuple[float, tuple[float, float]]:
    """Return by how many points of effective accuracy an arm leads another, and the interval."""
    good = [
        ((each.status == 200) & (each.latency <= scene.slo)).astype(np.float64) * each.correct
        for each in (arm, other)
    ]
    difference = 100 * (good[0] - good[1])  # the same request in both
    return float(difference.mean()), interval(difference, mean)


def table(found: dict[str, dict[str, Any]], labelled: bool) -> str:
    """Return a row for each arm."""
    header = ["requests at", "errors", "refused", "late", "p50 ms", "p99 ms", "p99 ms, settled",
              "good/s", "good/s in the burst", "mean rate in the burst"]  # fmt: skip
    header += ["effective accuracy, %", "accuracy of answers in the burst, %"] * labelled
    rows = []
    for name, each in found.items():
        share = [f"{100 * each[key] / each['offered']:.1f} %" for key in ("refused", "late")]
        row = [name, each["errors"], *share, f"{each['p50_ms']:.0f}", _ranged(each, "p99_ms", 0),
               _ranged(each, "p99_settled_ms", 0), f"{each['goodput']:.1f}",
               f"{each['goodput_burst']:.1f}", f"{each['rate_burst']:.1f}"]  # fmt: skip
        if labelled:
            row += [_ranged(each, "effective_accuracy", 1), f"{each['accuracy_burst']:.1f}"]
        rows.append(row)
    return markdown(header, rows)


def _ranged(each: dict[str, Any], key: str, digits: int) -> str:
    low, high = each[f"{key}_interval"]
    return f"{each[key]:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def report(result: dict[str, Any]) -> str:
    """Return all that was found, in Markdown."""
    arms, steps = result["arms"], result["steps"]
    capacities = ", ".join(
        f"{each:.1f} at rate {rate}" for rate, each in result["capacity"].items()
    )
    load = ", ".join(f"{step['seconds']:g} s of {step['rate']:.1f}/s" for step in steps)
    lines = [
        f"{result['machine']}.\n{result['subject']}.",
        f"Capacity by HTTP, images/s: {capacities}. Offered: {load}; seed {result['seed']}. To be "
        f"answered within {result['slo_ms']:g} ms.\n",
        table(arms, result["labelled"]),
        "\nIn brackets: 95 % intervals, block bootstrap.\n",
    ]
    gain = arms["auto"]["goodput"] / arms["rate 0"]["goodput"]
    gain_burst = arms["auto"]["goodput_burst"] / arms["rate 0"]["goodput_burst"]
    lines.append(f"- Goodput of auto over rate 0: {gain:.2f}; in the burst {gain_burst:.2f}.")
    for name, (points, (low, high)) in result["ahead"].items():
        lines.append(f"- Effective accuracy of auto, less that of {name}: {points:+.1f} points "
                     f"({low:+.1f} to {high:+.1f}).")  # fmt: skip
    back = result["back_after_s"]
    lines.append(
        f"- Back at rate 0 after the burst: {'never' if back is None else f'{back:.1f} s'}."
    )
    late = ", ".join(f"{name} {each['client_late_ms']:.1f}" for name, each in arms.items())
    void = [name for name, each in arms.items() if each["void"]]
    lines.append(f"- The client's own lateness, p99 in ms: {late}; void if above "
                 f"{1000 * LATE:g}: {', '.join(void) or 'none'}.")  # fmt: skip
    return "\n".join(lines) + "\n"


def measure(what: Subject, served: Served, options: argparse.Namespace) -> dict[str, Any]:
    """Return all that is found about a server."""
    forms = [form(picture) for picture in what.pictures]
    rates = sorted({0, *options.rates})
    capacity(served, forms, rates[-1], options.images // 4)  # warms
    capacities = {rate: capacity(served, forms, rate, options.images) for rate in (0, rates[-1])}
    scene = make_scene(capacities, len(forms), options)
    ask = f"deadline_ms={options.slo_ms - options.allowance_ms}"
    queries = {
        "auto": f"rate=auto&{ask}",
        **{f"rate {rate}": f"rate={rate}&{ask}" for rate in rates},
    }
    if what.settings.bank:
        queries["auto, no bank"] = f"rate=auto&compensate=false&{ask}"
    arms = {}
    for name, query in queries.items():
        arms[name] = read(play(served, scene, query, forms), scene, what.classes)
        print(f"{name}: {int((arms[name].status == 200).sum())} of {len(scene.plan)}", flush=True)
        time.sleep(options.pause)
    return {
        "machine": machine.describe(),
        "subject": what.described,
        "labelled": what.classes is not None,
        "slo_ms": options.slo_ms,
        "seed": options.seed,
        "capacity": capacities,
        "steps": [vars(step) for step in scene.steps],
        "arms": {name: figures(arm, scene) for name, arm in arms.items()},
        "ahead": {
            name: ahead(arms["auto"], arm, scene)
            for name, arm in arms.items()
            if name != "auto" and what.classes
        },
        "back_after_s": until_back(arms["auto"], scene.burst[1]),
        "series": {name: series(arm, scene) for name, arm in arms.items()},
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    subject.add_arguments(parser)
    parser.add_argument("--folder", type=Path, default=Path("runs/elastic"))
    parser.add_argument(
        "--rates", type=int, nargs="+", default=[0, 4, 8, 12, 16], help="fixed ones"
    )
    parser.add_argument("--seconds", type=float, nargs=3, default=[20, 30, 20],
                        metavar=("BEFORE", "BURST", "AFTER"))  # fmt: skip
    parser.add_argument("--slo-ms", type=int, default=500)
    parser.add_argument("--allowance-ms", type=int, default=10,
                        help="by how much the deadline that is asked for is earlier")  # fmt: skip
    parser.add_argument("--settle", type=float, default=2, help="seconds that auto may adjust")
    parser.add_argument("--images", type=int, default=600, help="for each capacity")
    parser.add_argument("--pause", type=float, default=3, help="seconds between two arms")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    what = subject.from_arguments(options)
    options.folder.mkdir(parents=True, exist_ok=True)
    with serving(options.folder / "server.log", models=what.served) as served:
        result = measure(what, served, options)
    (options.folder / "elastic.json").write_text(json.dumps(result, indent=1) + "\n")
    (options.folder / "elastic.md").write_text(report(result))
    plot(result, options.folder)
    print(f"\n{report(result)}")


if __name__ == "__main__":
    main()
