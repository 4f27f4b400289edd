import pytest
from hypothesis import given
from hypothesis import strategies as st

from tocom import ConfigError
from training.pictures.sampler import Draw, Shares, StepSampler
from training.seeds import derive


@given(
    pictures=st.integers(1, 20), batch=st.integers(1, 8), steps=st.integers(1, 12), data=st.data()
)
def test_sampler_resumes_where_it_stopped(
    pictures: int, batch: int, steps: int, data: st.DataObject
) -> None:
    keys = [(0, i) for i in range(pictures)]
    start = data.draw(st.integers(0, steps))
    whole = list(StepSampler(keys, batch, steps, 0, seed=3))
    assert list(StepSampler(keys, batch, steps, start, seed=3)) == whole[start:]
    flat = [draw for step in whole for draw in step]
    for epoch in range(len(flat) // pictures):  # every picture once an epoch
        drawn = flat[epoch * pictures : (epoch + 1) * pictures]
        assert sorted(draw.index for draw in drawn) == list(range(pictures))


@given(
    pictures=st.integers(1, 20),
    processes=st.integers(1, 3),
    accumulation=st.integers(1, 3),
    size=st.integers(1, 3),
    repeats=st.integers(1, 4),
    start=st.integers(0, 4),
)
def test_processes_and_accumulations_share_out_the_same_batches(
    pictures: int, processes: int, accumulation: int, size: int, repeats: int, start: int
) -> None:
    keys = [(0, i) for i in range(pictures)]
    batch = processes * accumulation * size

    def micros(start: int, shares: Shares) -> list[list[Draw]]:
        sampler = StepSampler(keys, batch, 4, start, 5, repeats, shares)
        drawn = list(sampler)
        assert len(sampler) == len(drawn) == (4 - start) * shares.accumulation
        return drawn

    alone = micros(start, Shares(accumulation=processes * accumulation))
    each = [micros(start, Shares(processes, p, accumulation)) for p in range(processes)]
    assert [each[p][i] for i in range(len(each[0])) for p in range(processes)] == alone
    whole = [draw for step in micros(start, Shares()) for draw in step]
    assert [draw for micro in alone for draw in micro] == whole


def test_repeats_draw_each_picture_in_a_row_at_positions_of_their_own() -> None:
    keys = [(0, i) for i in range(4)]
    once = [draw.index for step in StepSampler(keys, 4, 3, 0, 5) for draw in step]
    thrice = [draw for step in StepSampler(keys, 12, 3, 0, 5, repeats=3) for draw in step]
    assert [draw.index for draw in thrice] == [index for index in once for _ in range(3)]
    assert [draw.position for draw in thrice] == list(range(36))


def test_seeds_of_augmentations_are_left_to_those_who_augment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    derived: list[str] = []

    def note(seed: int, purpose: str, position: int) -> int:
        derived.append(purpose)
        return derive(seed, purpose, position)

    monkeypatch.setattr("training.pictures.sampler.derive", note)
    list(StepSampler([(0, i) for i in range(4)], 6, 2, 0, seed=5))
    assert derived == ["order"] * 3  # of the epochs


def test_batches_that_cannot_be_shared_out_are_refused() -> None:
    with pytest.raises(ConfigError, match="10 pictures .* 2 processes x 3 acc.* multiple of 6"):
        StepSampler([(0, 0)], 10, 1, 0, 0, shares=Shares(2, 0, 3))
