import itertools
import os
import sys
import threading
from pathlib import Path

import pytest
import torch

from server.engine.threads import (
    LONGEST_PAUSE,
    NICE,
    PAUSE,
    SHARE,
    Team,
    available_processors,
    begin_beside_forwards,
    set_torch_threads,
)
from tests.server.works import PATIENCE, Clock

CORES = len(os.sched_getaffinity(0))


def container(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.mark.parametrize(
    ("files", "limit"),
    [
        ({}, CORES),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"}, CORES),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "100000 100000\n"}, 1),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "20000 100000\n"}, 1),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "150000 100000\n"}, 2),
        # The limit of an outer group holds for all inside.
        (
            {
                "proc/self/cgroup": "0::/pod/app\n",
                "sys/fs/cgroup/pod/cpu.max": "100000 100000\n",
                "sys/fs/cgroup/pod/app/cpu.max": "max 100000\n",
            },
            1,
        ),
        (
            {
                "proc/self/cgroup": "5:memory:/x\n4:cpu,cpuacct:/x\n0::/\n",
                "sys/fs/cgroup/cpu/x/cpu.cfs_quota_us": "100000\n",
                "sys/fs/cgroup/cpu/x/cpu.cfs_period_us": "100000\n",
            },
            1,
        ),
        (
            {
                "proc/self/cgroup": "4:cpu,cpuacct:/\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            CORES,
        ),
    ],
)
def test_processors_are_those_of_the_container(tmp_path, files, limit):
    assert available_processors(container(tmp_path, files)) == min(limit, CORES)


def test_processors_are_no_more_than_the_affinity_allows(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3, 5, 7})
    assert available_processors(tmp_path) == 3


def test_threads_that_are_to_come_begin_with_one():
    seen: list[int] = []

    def ask() -> None:
        seen.append(torch.get_num_threads())

    def take_three() -> None:
        set_torch_threads(3)
        ask()
        later = threading.Thread(target=ask)
        later.start()
        later.join()
        ask()

    worker = threading.Thread(target=take_three)
    worker.start()
    worker.join()
    assert seen == [3, 1, 3]


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere threads have no niceness")
def test_threads_beside_forwards_are_nicer_and_alone_in_that():
    seen: list[tuple[int, int]] = []

    def ask() -> None:
        begin_beside_forwards()
        seen.append((os.nice(0), torch.get_num_threads()))

    before = os.nice(0)
    worker = threading.Thread(target=ask)
    worker.start()
    worker.join()
    assert seen == [(min(19, before + NICE), 1)]
    assert os.nice(0) == before


def test_a_sandbox_that_forbids_niceness_stops_no_thread(monkeypatch, two_threads):
    def forbidden(*_: int) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "setpriority", forbidden)
    begin_beside_forwards()
    assert torch.get_num_threads() == 1


class Machine:
    """A clock of the world and one of a process that has a share of its cores' time."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.spent = Clock()

    def run(self, team: Team, share: float, seconds: float = 0.1) -> int:
        """Run a forward; return how many threads it got."""
        with team:
            threads = torch.get_num_threads()
            self.clock.now += seconds
            self.spent.now += share * seconds * threads
        return threads


@pytest.fixture
def machine() -> Machine:
    return Machine()


@pytest.fixture
def team(machine) -> Team:
    return Team(2, machine.clock, machine.spent)


def test_a_forward_alone_gets_all_threads(machine, team):
    assert [machine.run(team, 1.0) for _ in range(50)] == [2] * 50


def test_threads_are_set_only_where_their_number_changes(machine, team, monkeypatch):
    asked: list[int] = []
    monkeypatch.setattr("server.engine.threads.set_torch_threads", asked.append)
    monkeypatch.setattr(torch, "get_num_threads", lambda: asked[-1] if asked else 1)
    for _ in range(3):
        machine.run(team, 1.0)
    assert asked == [2]
    for _ in range(3):
        team.run(torch.clone, torch.zeros(8, 3, 2, 2))
    assert asked == [2, 1]
    machine.run(team, 1.0)
    assert asked == [2, 1, 2]


def test_a_team_of_one_leaves_the_threads_of_its_caller(monkeypatch):
    monkeypatch.setattr("server.engine.threads.set_torch_threads", pytest.fail)
    assert torch.equal(*Team(1).run(torch.clone, torch.zeros(1)), torch.zeros(1))


def test_one_interruption_changes_nothing(machine, team):
    machine.run(team, 0.7)
    assert machine.run(team, 1.0) == 2


def test_beside_a_busy_program_it_gets_one(machine, team):
    while machine.run(team, 0.6) == 2:
        pass
    assert machine.clock.now < 101
    assert machine.run(team, 1.0) == 1


def test_all_threads_are_tried_again_ever_more_rarely(machine, team):
    tries = [machine.clock.now for _ in range(10_000) if machine.run(team, 0.6) == 2]
    pauses = [after - before for before, after in itertools.pairwise(tries)]
    pauses = [round(pause) for pause in pauses if pause > 0.5]
    assert pauses[0] == PAUSE
    assert pauses == sorted(pauses)
    assert pauses[-1] == LONGEST_PAUSE


def test_when_the_neighbour_has_gone_it_gets_all_again(machine, team):
    for _ in range(100):
        machine.run(team, 0.6)
    machine.clock.now += LONGEST_PAUSE
    assert [machine.run(team, 1.0) for _ in range(20)].count(2) > 15


def test_shares_are_run_side_by_side_and_come_back_in_order(two_threads):
    team, together = Team(3), threading.Barrier(3)

    def forward(images: torch.Tensor) -> torch.Tensor:
        together.wait(PATIENCE)  # breaks, unless all three run at once
        assert torch.is_inference_mode_enabled()
        assert torch.get_num_threads() == 1
        return images + 1

    images = torch.arange(14.0).view(14, 1, 1, 1)
    shares = team.run(forward, images)
    assert [len(share) for share in shares] == [5, 5, 4]
    assert torch.equal(torch.cat(shares), images + 1)


def test_what_a_share_raises_the_caller_gets():
    def forward(images: torch.Tensor) -> None:
        raise ValueError(f"{len(images)} images")

    with pytest.raises(ValueError, match="4 images"):
        Team(2).run(forward, torch.zeros(8, 3, 2, 2))


@pytest.mark.parametrize(("threads", "images"), [(2, 2 * SHARE - 1), (1, 100)])
def test_few_images_and_those_of_one_thread_are_not_shared_out(threads, images):
    seen: list[tuple[int, int]] = []

    def forward(images: torch.Tensor) -> None:
        seen.append((threading.get_ident(), len(images)))

    Team(threads).run(forward, torch.zeros(images, 3, 2, 2))
    assert seen == [(threading.get_ident(), images)]
