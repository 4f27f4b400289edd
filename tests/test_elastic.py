"""What `benchmarks/elastic` computes: the oracle's bound, bursts, the simulated machine."""

import itertools
import random

import numpy as np
import pytest

from benchmarks.elastic import simulated
from benchmarks.elastic.oracle import best
from benchmarks.load import gamma_plan
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


@pytest.mark.parametrize("trace", ["steps", "4"])
def test_auto_is_ahead_of_every_fixed_rate_and_of_slackfit_where_a_rate_costs_accuracy(trace):
    plans = simulated.plans(trace, 2, seconds=6)

    def played(kind: type[Controller], rate: int | None) -> float:
        machines = [simulated.uneven(seed) for seed in range(len(plans))]
        served = [
            simulated.effective(simulated.serve(kind, rate, plan, 0.5, machine))
            for plan, machine in zip(plans, machines, strict=True)
        ]
        return sum(served) / len(served)

    auto = played(Controller, None)
    assert auto > played(SlackFit, None)
    for rate in range(len(simulated.IMAGE)):
        assert auto > played(Controller, rate)
    bounds = [100 * best(plan, 0.5, simulated.TOP_1, simulated.usual, 16, 0.004) for plan in plans]
    assert 0.95 < auto / (sum(bounds) / len(bounds)) <= 1


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
