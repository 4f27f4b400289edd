"""One way to ask, through one trace: what became of each request, and what it comes to."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.estimates import Floats
from benchmarks.load import LATE, Exchange

#: Seconds for which every answer must be at rate 0 for auto to be back there.
BACK = 1.0


@dataclass(frozen=True)
class Scene:
    """What every arm goes through.

    Attributes:
        plan: when each request is sent, in seconds.
        pictures: which picture it has.
        seconds: from the beginning to the end.
        slo: seconds in which each is to be answered.
        burst: when the burst begins and ends, if there is one.
    """

    plan: list[float]
    pictures: list[int]
    seconds: float
    slo: float
    burst: tuple[float, float] | None = None


@dataclass(frozen=True)
class Known:
    """What the model says of the pictures, at index r at rate r; rows are rates.

    Attributes:
        said: the class of each picture [R, P].
        classes: the true ones [P]; None: they are not labelled.
    """

    said: Floats
    classes: Floats | None

    def right(self, what: str) -> Floats:
        """Return which answers are right [R, P]: by `accuracy`, or by `agreement` with rate 0."""
        truth = self.said[0] if what == "agreement" else self.classes
        assert truth is not None
        return (self.said == truth).astype(np.float64)

    @property
    def measures(self) -> list[str]:
        """By what answers can be judged."""
        return ["agreement"] if self.classes is None else ["accuracy", "agreement"]


@dataclass(frozen=True)
class Arm:
    """What became of each request of a scene, in their order.

    Attributes:
        planned, sent, done: seconds since the beginning.
        status: of the answers; 0: there was none.
        rate: that ran; -1 where nothing did.
        said: the class; -1 where there is none.
    """

    planned: Floats
    sent: Floats
    done: Floats
    status: Floats
    rate: Floats
    said: Floats

    @property
    def latency(self) -> Floats:
        """Seconds from when each was to be sent."""
        return self.done - self.planned

    def good(self, scene: Scene, known: Known, what: str) -> Floats:
        """Return 1 for each request that was answered in time and rightly, else 0."""
        truth = known.said[0] if what == "agreement" else known.classes
        assert truth is not None
        in_time = (self.status == 200) & (self.latency <= scene.slo)
        return (in_time & (self.said == truth[scene.pictures])).astype(np.float64)


#: Seconds that batches took, by rate and images.
BatchTimes = dict[tuple[int, int], list[float]]


def read(exchanges: Sequence[Exchange], took: BatchTimes) -> Arm:
    """Read the answers, and add to what batches took."""
    rates, said = [], []
    for exchange in exchanges:
        answer = exchange.json() if exchange.status == 200 else None
        rates.append(answer["rate"] if answer else -1)
        said.append(answer["predictions"][0]["index"] if answer else -1)
        if answer:
            batch = took.setdefault((answer["rate"], answer["batch_size"]), [])
            batch.append(answer["timings_ms"]["inference"] / 1000)
    planned, sent, done, status = np.array(
        [(each.planned, each.sent, each.done, each.status) for each in exchanges]
    ).T
    return Arm(planned, sent, done, status, np.array(rates, float), np.array(said, float))


def usual(took: Mapping[tuple[int, int], Sequence[float]], rate: int, images: int) -> float:
    """Return the median seconds of a batch; between the sizes that ran, in proportion."""
    ran = sorted(size for known, size in took if known == rate)
    if not ran:
        raise ValueError(f"no batch ran at rate {rate}")
    medians = [float(np.median(took[rate, size])) for size in ran]
    if images < ran[0] or images > ran[-1]:
        end = 0 if images < ran[0] else -1
        return medians[end] * images / ran[end]
    return float(np.interp(images, ran, medians))


def figures(arm: Arm, scene: Scene, known: Known) -> dict[str, Any]:
    """Return what an arm comes to; shares are of all that was offered."""
    ok = arm.status == 200
    in_time = ok & (arm.latency <= scene.slo)
    # What is late is dropped at its deadline, and has waited until then.
    admitted = ok | (arm.status == 504)
    begins, ends = scene.burst or (0.0, scene.seconds)
    burst = (arm.planned >= begins) & (arm.planned < ends)
    late_client = float(np.percentile(arm.sent - arm.planned, 99))
    return {
        "offered": len(ok),
        "refused": int((arm.status == 503).sum()),
        "late": int((admitted & ~in_time).sum()),
        "errors": int((~admitted & (arm.status != 503)).sum()),
        "p99_ms": 1000 * float(np.percentile(arm.latency[admitted], 99)) if admitted.any() else 0,
        "goodput": float(in_time.sum() / scene.seconds),
        "goodput_burst": float((in_time & burst).sum() / (ends - begins)),
        **{what: 100 * float(arm.good(scene, known, what).mean()) for what in known.measures},
        "rate": _mean(arm.rate[ok]),
        "rate_burst": _mean(arm.rate[burst & ok]),
        "back_after_s": until_back(arm, scene.burst[1]) if scene.burst else None,
        "client_late_ms": 1000 * late_client,
        "void": late_client > LATE,
    }


def _mean(values: Floats) -> float | None:
    return float(values.mean()) if len(values) else None


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
    seconds = range(int(scene.seconds))

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
