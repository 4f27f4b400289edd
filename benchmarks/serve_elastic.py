"""What `rate=auto` is worth when load comes and goes: the same arrivals for auto and all others.

    python -m benchmarks.serve_elastic --pictures eval.tar --folder runs/elastic

First every picture is asked about once at every rate, by HTTP in a closed loop: that gives the
capacity, and what each rate answers. Then open loops, two traces:

- `steps`: a Poisson process at half of the capacity at rate 0, a burst of 90 % of that at the
  highest rate, and back;
- `bursts`: gaps drawn from a gamma whose standard deviation is several times their mean, at a share
  of the capacity at rate 0 in the mean.

Each round draws both anew, and every arm gets the same pictures at the same times, each request
with the same deadline: auto, SlackFit (a second server, with that policy), and each fixed rate. The
server refuses what it knows to be late, whatever the arm. The order of the arms changes from round
to round.

Effective accuracy is the share of all requests that were answered in time and rightly; effective
agreement takes rate 0's answers for the right ones. The oracle's bound is computed from the same
arrivals, the batch times that all arms had, and what each rate answers (`benchmarks/elastic`).
Times are from when a request was to be sent; those that were refused, late or wrong stay in the
denominator. An arm is void if the client was late itself. Forwards are not compiled unless it is
asked for: compiling takes its part while arms run. Writes `elastic.json`, `.md`, `.svg` and `.png`.
"""

import argparse
import itertools
import json
import random
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import machine, subject
from benchmarks.elastic.arms import Arm, BatchTimes, Known, Scene, figures, read, series, usual
from benchmarks.elastic.oracle import best
from benchmarks.elastic.plot import plot
from benchmarks.elastic.report import report
from benchmarks.estimates import Floats, interval, mean
from benchmarks.load import (
    Exchange,
    Step,
    closed_loop,
    first_in_line,
    form,
    gamma_plan,
    open_loop,
    poisson_plan,
    run_loop,
    upload,
)
from benchmarks.served import Served, serving
from benchmarks.subject import Subject

#: Share of the capacity at rate 0 before and after the burst.
QUIET = 0.5
STEPS, BURSTS = "steps", "bursts"


def steps(capacities: Sequence[float], options: argparse.Namespace) -> list[Step]:
    """Return the load before, in and after the burst."""
    before, during, after = options.seconds
    quiet, burst = QUIET * capacities[0], options.burst * capacities[-1]
    return [Step(before, quiet), Step(during, burst), Step(after, quiet)]


def make_scene(
    trace: str, capacities: Sequence[float], pictures: int, options: argparse.Namespace, seed: int
) -> Scene:
    """Plan the arrivals of a trace; `capacities` are images a second, at index r at rate r."""
    slo, burst = options.slo_ms / 1000, None
    if trace == STEPS:
        seconds = sum(options.seconds)
        plan = poisson_plan(steps(capacities, options), seed)
        burst = options.seconds[0], options.seconds[0] + options.seconds[1]
    else:
        seconds = options.bursts_seconds
        plan = gamma_plan(seconds, options.load * capacities[0], options.variation, seed)
    chosen = random.Random(seed).choices(range(pictures), k=len(plan))
    return Scene(plan, chosen, seconds, slo, burst)


def described(trace: str, capacities: Sequence[float], options: argparse.Namespace) -> str:
    """Say what is offered."""
    if trace == STEPS:
        each = (f"{step.seconds:g} s of {step.rate:.1f}/s" for step in steps(capacities, options))
        return ", ".join(each) + ", Poisson."
    return (
        f"{options.bursts_seconds:g} s of {options.load * capacities[0]:.1f}/s in the mean, gaps "
        f"whose standard deviation is {options.variation:g} times their mean (gamma)."
    )


def ask_all(
    served: Served, forms: Sequence[bytes], rate: int, images: int
) -> tuple[float, list[Exchange]]:
    """Ask about pictures in turn; return the images a second and the answers."""
    bodies = itertools.islice(itertools.cycle(forms), images)
    asked = (upload(f"/v1/classify?rate={rate}", body) for body in bodies)
    exchanges = closed_loop(served.port, asked, concurrency=64)
    if wrong := [each for each in exchanges if each.status != 200]:
        raise RuntimeError(f"{len(wrong)} requests failed: {wrong[0].status} {wrong[0].body!r}")
    return images / max(each.done for each in exchanges), exchanges


def play(served: Served, scene: Scene, query: str, forms: Sequence[bytes]) -> list[Exchange]:
    """Send the scene's requests with a query."""
    asked = (upload(f"/v1/classify?{query}", forms[picture]) for picture in scene.pictures)
    with first_in_line():
        return run_loop(open_loop(served.port, scene.plan, asked))


def ahead(good: Sequence[Floats], other: Sequence[Floats]) -> tuple[float, tuple[float, float]]:
    """Return by how many points an arm leads another over all rounds, and the interval."""
    difference = 100 * (np.concatenate(good) - np.concatenate(other))  # the same request in both
    return float(difference.mean()), interval(difference, mean)


class Measurement:
    """Servers that have been warmed, what is known of their model, and how long batches took."""

    def __init__(
        self, what: Subject, servers: dict[str, Served], options: argparse.Namespace
    ) -> None:
        self.options = options
        self.servers = servers
        self.forms = [form(picture) for picture in what.pictures]
        highest = what.load().max_rate
        self.rates = range(highest + 1)
        if beyond := {*(options.rates or ())} - {*self.rates}:
            raise SystemExit(f"--rates are 0 to {highest} here, got {min(beyond)}")
        for served in servers.values():
            for rate in self.rates:
                ask_all(served, self.forms, rate, options.warm)
        found = [ask_all(servers["auto"], self.forms, rate, len(self.forms)) for rate in self.rates]
        self.capacities = [capacity for capacity, _ in found]
        self.took: BatchTimes = {}
        said = np.array([read(exchanges, self.took).said for _, exchanges in found])
        classes = None if what.classes is None else np.array(what.classes, float)
        self.known = Known(said, classes)
        ask = f"deadline_ms={options.slo_ms - options.allowance_ms}"
        self.queries = dict.fromkeys(servers, f"rate=auto&{ask}")
        fixed = sorted({0, *(options.rates or self.rates)})  # rate 0 is what others are set beside
        self.queries |= {f"rate {rate}": f"rate={rate}&{ask}" for rate in fixed}

    def trace(self, name: str) -> dict[str, Any]:
        """Return what all arms come to in all rounds of a trace."""
        scenes, arms = [], {}
        for number in range(self.options.repeats):
            scene = make_scene(
                name, self.capacities, len(self.forms), self.options, self.options.seed + number
            )
            scenes.append(scene)
            order = list(self.queries)
            random.Random(number).shuffle(order)
            for arm in order:
                served = self.servers.get(arm, self.servers["auto"])
                exchanges = play(served, scene, self.queries[arm], self.forms)
                arms[arm, number] = read(exchanges, self.took)
                ok = int((arms[arm, number].status == 200).sum())
                print(f"{name} {number + 1}, {arm}: {ok} of {len(scene.plan)}", flush=True)
                time.sleep(self.options.pause)
        return self._summary(name, scenes, arms)

    def _summary(
        self, name: str, scenes: list[Scene], arms: dict[tuple[str, int], Arm]
    ) -> dict[str, Any]:
        good = {
            (what, arm): [
                arms[arm, number].good(scene, self.known, what)
                for number, scene in enumerate(scenes)
            ]
            for what in self.known.measures for arm in self.queries
        }  # fmt: skip
        return {
            "described": described(name, self.capacities, self.options),
            "burst": scenes[0].burst,
            "arms": {
                arm: [
                    figures(arms[arm, number], scene, self.known)
                    for number, scene in enumerate(scenes)
                ]
                for arm in self.queries
            },
            "ahead": {
                what: {
                    arm: ahead(good[what, "auto"], good[what, arm])
                    for arm in self.queries if arm != "auto"
                }
                for what in self.known.measures
            },
            "oracle": {
                what: [self.bound(scene, what) for scene in scenes] for what in self.known.measures
            },
            "series": {arm: series(arms[arm, 0], scenes[0]) for arm in self.queries},
        }  # fmt: skip

    def bound(self, scene: Scene, what: str) -> float:
        """Return the oracle's effective accuracy or agreement in a scene, in percent."""
        right = self.known.right(what)[:, scene.pictures]
        largest = max(size for _, size in self.took)
        times = partial(usual, self.took)
        return 100 * best(scene.plan, scene.slo, right.mean(1).tolist(), times, largest)


def measure(
    what: Subject, servers: dict[str, Served], options: argparse.Namespace
) -> dict[str, Any]:
    """Return all that is found about servers."""
    measurement = Measurement(what, servers, options)
    known = measurement.known
    return {
        "machine": machine.describe(),
        "subject": what.described,
        "slo_ms": options.slo_ms,
        "seed": options.seed,
        "repeats": options.repeats,
        "capacity": dict(enumerate(measurement.capacities)),
        "known": {what: known.right(what).mean(1).tolist() for what in known.measures},
        "traces": {name: measurement.trace(name) for name in options.traces},
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    subject.add_arguments(parser)
    parser.add_argument("--folder", type=Path, default=Path("runs/elastic"))
    parser.add_argument("--traces", nargs="+", choices=[STEPS, BURSTS], default=[STEPS, BURSTS])
    parser.add_argument("--rates", type=int, nargs="+", help="fixed ones beside 0; default: all")
    parser.add_argument("--repeats", type=int, default=3, help="rounds of each trace")
    parser.add_argument("--seconds", type=float, nargs=3, default=[2, 4, 3],
                        metavar=("BEFORE", "BURST", "AFTER"), help="of the steps")  # fmt: skip
    parser.add_argument("--burst", type=float, default=0.9,
                        help="its load: share of the capacity at the highest rate")  # fmt: skip
    parser.add_argument("--bursts-seconds", type=float, default=8, help="of the other trace")
    parser.add_argument("--load", type=float, default=0.6,
                        help="its mean load: share of the capacity at rate 0")  # fmt: skip
    parser.add_argument("--variation", type=float, default=4,
                        help="of its gaps: their standard deviation over their mean")  # fmt: skip
    parser.add_argument("--slo-ms", type=int, default=500)
    parser.add_argument("--allowance-ms", type=int, default=10,
                        help="by how much the deadline that is asked for is earlier")  # fmt: skip
    parser.add_argument("--warm", type=int, default=64, help="images at each rate at first")
    parser.add_argument("--max-graphs", type=int, default=0, help="forwards that are compiled")
    parser.add_argument("--pause", type=float, default=0.5, help="seconds between two arms")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    what = subject.from_arguments(options)
    options.folder.mkdir(parents=True, exist_ok=True)
    given = {"models": what.served, "max_graphs": options.max_graphs}
    with (
        serving(options.folder / "server.log", **given) as ours,
        serving(options.folder / "slackfit.log", auto_policy="slackfit", **given) as theirs,
    ):
        result = measure(what, {"auto": ours, "SlackFit": theirs}, options)
    (options.folder / "elastic.json").write_text(json.dumps(result, indent=1) + "\n")
    (options.folder / "elastic.md").write_text(report(result))
    if STEPS in result["traces"]:
        plot(result, options.folder)
    print(f"\n{report(result)}")


if __name__ == "__main__":
    main()
