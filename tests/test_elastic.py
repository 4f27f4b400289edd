"""What `serve_elastic` and `benchmarks/elastic` make of arrivals and answers."""

import argparse
import functools
import itertools
import json
import random

import numpy as np
import pytest

from benchmarks import serve_elastic
from benchmarks.elastic import arms, simulated
from benchmarks.elastic.oracle import best
from benchmarks.elastic.plot import plot
from benchmarks.elastic.report import report
from benchmarks.estimates import Floats
from benchmarks.load import Exchange, gamma_plan
from server.engine.rates import Controller
from server.engine.slackfit import SlackFit

SLO = 1.0
WORTH = (1.0, 0.8)


def seconds(rate: int, images: int) -> float:
    return 0.1 + images * (0.4, 0.2)[rate]


def tried(arrivals: list[float], max_batch: int) -> float:
    """The most that any order of batches gives, of all that there are."""

    def after(left: frozenset[int], free: float) -> float:
        found = 0.0
        for size in range(1, max_batch + 1):
            for images in itertools.combinations(sorted(left), size):
                begins = max(free, *(arrivals[i] for i in images))
                for rate, worth in enumerate(WORTH):
                    ends = begins + seconds(rate, size)
                    if ends <= min(arrivals[i] for i in images) + SLO + 1e-9:
                        found = max(found, size * worth + after(left - {*images}, ends))
        return found

    return after(frozenset(range(len(arrivals))), 0.0) / len(arrivals)


@pytest.mark.parametrize("seed", range(12))
def test_the_oracle_finds_what_trying_everything_finds(seed):
    chance = random.Random(seed)
    arrivals = sorted(chance.uniform(0, chance.choice((0.3, 1.5, 4.0))) for _ in range(5))
    assert best(arrivals, SLO, WORTH, seconds, 3, grid=1e-4) == pytest.approx(tried(arrivals, 3))


def test_the_oracle_answers_all_at_rate_0_where_there_is_time():
    assert best([0.0, 5.0, 10.0], SLO, WORTH, seconds, 4) == 1.0


def test_the_oracle_waits_for_a_batch_if_that_is_better():
    # Alone each takes 0.5 s: the second would be late at rate 0, and both together are in time.
    assert best([0.0, 0.05], SLO, WORTH, lambda rate, images: 0.9 - 0.1 * rate, 2) == 1.0
    assert best([0.0, 0.05], SLO, WORTH, lambda rate, images: 0.9 - 0.1 * rate, 1) == 0.5


def test_the_oracle_can_do_nothing_where_all_is_too_slow():
    assert best([0.0, 0.5], SLO, WORTH, lambda rate, images: 2.0, 4) == 0.0


def test_a_coarse_grid_only_makes_the_bound_looser():
    arrivals = gamma_plan(4, 20, 4, seed=0)
    coarse, fine = (
        best(arrivals, 0.5, (0.8, 0.7), lambda rate, n: n * (0.06, 0.03)[rate], 8, grid)
        for grid in (0.01, 0.001)
    )
    assert fine <= coarse <= 1.2 * fine


@pytest.mark.parametrize("variation", [1, 4, 8])
def test_gaps_vary_as_they_are_to(variation):
    plan = np.array(gamma_plan(2000, 30, variation, seed=1))
    assert len(plan) == 60_000
    assert (np.diff(plan) >= 0).all()
    assert 0 <= plan[0] < plan[-1] <= 2000
    gaps = np.diff(plan)
    assert gaps.std() / gaps.mean() == pytest.approx(variation, rel=0.1)


def test_a_plan_of_bursts_is_the_seed_s():
    assert gamma_plan(10, 30, 4, 1) == gamma_plan(10, 30, 4, 1)
    assert gamma_plan(10, 30, 4, 1) != gamma_plan(10, 30, 4, 2)


TRACES = "steps", "4"


@functools.cache
def plans(trace: str) -> list[list[float]]:
    return simulated.plans(trace, 12)


@functools.cache
def played(trace: str, kind: type[Controller], rate: int | None) -> Floats:
    """Effective accuracy, in percent, of each plan on a machine that is the plan's alone."""
    served = (
        simulated.serve(kind, rate, plan, 0.5, simulated.uneven(seed))
        for seed, plan in enumerate(plans(trace))
    )
    return np.array([simulated.effective(images) for images in served])


@pytest.mark.parametrize("trace", TRACES)
def test_auto_is_near_the_oracle_and_behind_no_fixed_rate_nor_slackfit(trace):
    auto = played(trace, Controller, None)
    others = [(Controller, rate) for rate in range(len(simulated.IMAGE))]
    for other in ((SlackFit, None), *others):
        ahead = auto - played(trace, *other)
        # More than chance explains (twice the standard error) it is never behind.
        assert ahead.mean() > -2 * ahead.std(ddof=1) / len(auto) ** 0.5
    bounds = [
        100 * best(plan, 0.5, simulated.TOP_1, simulated.usual, 16, 0.004) for plan in plans(trace)
    ]
    assert 0.95 < auto.mean() / np.mean(bounds) <= 1


def test_no_rate_is_as_good_as_auto_whatever_comes():
    def over_all(kind: type[Controller], rate: int | None) -> float:
        return float(np.mean([played(trace, kind, rate) for trace in TRACES]))

    auto = over_all(Controller, None)
    assert auto > over_all(SlackFit, None)
    for rate in range(len(simulated.IMAGE)):
        assert auto > over_all(Controller, rate)


def test_auto_is_back_at_rate_0_soon_after_a_burst():
    (plan,) = simulated.plans("steps", 1)
    images = simulated.serve(Controller, None, plan, 0.5, simulated.uneven(0))
    burst = [image.rate for image in images if 5.5 <= image.arrived < 10]
    after = [image.rate for image in images if image.arrived >= 11]
    assert sum(burst) / len(burst) > 2
    assert sum(after) / len(after) < 0.5


def test_images_are_refused_dropped_or_answered():
    images = simulated.serve(Controller, 0, [0.0] * 60, 0.5, simulated.uneven(0))
    answered = [image for image in images if image.rate >= 0]
    assert 20 < len(answered) < 40
    assert all(image.done == 0 for image in images if image.rate < 0)
    assert all(image.reason == "asked" for image in answered)


def test_a_simulation_prints_a_table(capsys):
    simulated.main(["--repeats", "1", "--variations", "--seconds", "3"])
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("| requests at | steps: effective accuracy, % |")
    assert [line.split("|")[1].strip() for line in said[2:]] == [
        "auto", "SlackFit", *(f"rate {rate}" for rate in range(5)), "oracle, a bound",
    ]  # fmt: skip


PLAN = [0.0, 1.0, 2.0, 2.5, 3.0, 4.0, 5.5]
SCENE = arms.Scene(PLAN, pictures=[0] * 7, seconds=6, slo=0.5, burst=(2.0, 4.0))
#: At rate 0 the picture is taken for class 3, at 1 for class 5, which it is.
KNOWN = arms.Known(said=np.array([[3.0], [5.0]]), classes=np.array([5.0]))


def arm(latency, status, rate, said, late: float = 0.0) -> arms.Arm:
    planned = np.array(PLAN)
    values = (np.array(each, dtype=np.float64) for each in (status, rate, said))
    return arms.Arm(planned, planned + late, planned + latency, *values)


def answer(rate: int, said: int, batch: int, ms: float) -> Exchange:
    body = {
        "rate": rate,
        "predictions": [{"index": said}, {"index": 9}],
        "batch_size": batch,
        "timings_ms": {"inference": ms},
    }
    return Exchange(1.0, 1.001, 1.1, 200, json.dumps(body).encode())


def test_answers_are_read_and_batch_times_collected():
    took: arms.BatchTimes = {}
    refused = Exchange(2.0, 2.001, 2.1, 503, b"full")
    found = arms.read([answer(8, 7, 2, 40), answer(8, 3, 2, 60), refused], took)
    assert found.rate.tolist() == [8, 8, -1]
    assert found.said.tolist() == [7, 3, -1]
    assert found.status.tolist() == [200, 200, 503]
    assert found.latency.tolist() == pytest.approx([0.1, 0.1, 0.1])
    assert took == {(8, 2): [0.04, 0.06]}


def test_times_between_sizes_that_ran_are_in_proportion():
    took = {(0, 2): [0.2, 0.3, 9.0], (0, 4): [0.5]}
    found = [arms.usual(took, 0, images) for images in (1, 2, 3, 4, 8)]
    assert found == pytest.approx([0.15, 0.3, 0.4, 0.5, 1.0])
    with pytest.raises(ValueError, match="no batch ran at rate 1"):
        arms.usual(took, 1, 1)


def test_figures_keep_what_was_refused_late_or_wrong_in_the_denominator():
    found = arms.figures(
        arm(
            latency=[0.1, 0.1, 0.9, 0.1, 0.1, 0.49, 0.1],
            status=[200, 200, 200, 503, 200, 504, 0],
            rate=[0, 0, 1, -1, 1, -1, -1],
            said=[3, 5, 5, -1, 5, -1, -1],
        ),
        SCENE,
        KNOWN,
    )
    assert found["offered"] == 7
    assert (found["refused"], found["late"], found["errors"]) == (1, 2, 1)
    assert found["goodput"] == pytest.approx(3 / 6)
    assert found["goodput_burst"] == pytest.approx(1 / 2)
    assert found["accuracy"] == pytest.approx(100 * 2 / 7)
    assert found["agreement"] == pytest.approx(100 * 1 / 7)
    assert (found["rate"], found["rate_burst"]) == (0.5, 1)
    assert found["p99_ms"] == pytest.approx(900, rel=0.05)
    assert not found["void"]


def test_a_client_that_sends_late_makes_an_arm_void():
    ones = np.ones(7)
    assert arms.figures(arm(0.1, 200 * ones, 0 * ones, ones, late=0.003), SCENE, KNOWN)["void"]


def test_without_labels_there_is_agreement_alone():
    assert arms.Known(KNOWN.said, None).measures == ["agreement"]
    assert KNOWN.right("accuracy").tolist() == [[0], [1]]
    assert KNOWN.right("agreement").tolist() == [[1], [0]]


def test_back_at_rate_0_is_back_to_stay():
    planned = np.arange(0, 10, 0.25)
    rate = np.where((planned < 2) | (planned >= 5), 0.0, 16.0)
    rate[planned == 4.5] = 0  # one moment between two higher ones

    def until(rate) -> float | None:
        ones = np.ones(len(planned))
        return arms.until_back(arms.Arm(planned, planned, planned, 200 * ones, rate, ones), 4.0)

    assert until(rate) == 1.0
    assert until(np.full(len(planned), 3.0)) is None


def test_who_is_ahead_is_told_request_by_request():
    ones, one_less = np.ones(7), np.array([1.0] * 6 + [0.0])
    lead, (low, high) = serve_elastic.ahead([ones, ones], [one_less, ones])
    assert lead == pytest.approx(100 / 14)
    assert low <= lead <= high


OPTIONS = argparse.Namespace(
    seconds=[2, 4, 2], bursts_seconds=10, burst=0.9, load=0.5, variation=4, slo_ms=500
)


def test_both_traces_offer_what_capacity_says():
    scene = serve_elastic.make_scene("steps", [40, 60], 5, OPTIONS, seed=0)
    assert scene.burst == (2, 6)
    burst = sum(2 <= at < 6 for at in scene.plan)
    assert burst == pytest.approx(4 * 54, rel=0.2)
    assert set(scene.pictures) == set(range(5))
    bursts = serve_elastic.make_scene("bursts", [40, 60], 5, OPTIONS, seed=0)
    assert (len(bursts.plan), bursts.burst) == (10 * 20, None)


def test_a_report_and_a_plot_can_be_made_from_the_file(tmp_path):
    good = arm([0.1] * 7, [200] * 7, [0] * 7, [5] * 7)
    refused = arm([0.1] * 7, [503] * 7, [-1] * 7, [-1] * 7)
    rounds = [arms.figures(good, SCENE, KNOWN)] * 3
    lost = [arms.figures(refused, SCENE, KNOWN)] * 3
    trace = {
        "described": "a few.",
        "burst": SCENE.burst,
        "arms": {"auto": rounds, "SlackFit": rounds, "rate 0": rounds, "rate 1": lost},
        "ahead": {what: {"rate 0": (1.0, (0.5, 1.5))} for what in KNOWN.measures},
        "oracle": {what: [100.0] * 3 for what in KNOWN.measures},
        "series": {name: arms.series(good, SCENE) for name in ("auto", "rate 0")},
    }
    result = {
        "machine": "a machine", "subject": "a model", "capacity": {0: 40.0, 1: 60.0},
        "slo_ms": 500, "repeats": 3, "known": {"accuracy": [0.8, 0.7], "agreement": [1, 0.9]},
        "traces": {"steps": trace},
    }  # fmt: skip
    read = json.loads(json.dumps(result, allow_nan=False))
    plot(read, tmp_path)
    assert (tmp_path / "elastic.svg").exists()
    said = report(read)
    assert said == report(result)
    assert "| none, none |" in said  # of rate 1 nothing was answered
    assert "| SlackFit | 0 | 0.0 (0.0 to 0.0) % |" in said
    assert "| oracle, a bound |" in said
    assert "accuracy of auto over the oracle's: 1.000 (1.000 to 1.000)" in said
    assert "rate 0 +1.0 (+0.5 to +1.5)" in said
    assert "over rate 0, in the burst: 1.00" in said
    assert "Back at rate 0 after the burst:" in said
