from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from tocom import DataError
from training.pictures import unseen
from training.pictures.unseen import mean_over, read_unseen

DEVICE = torch.device("cpu")


def figures(images: Tensor) -> list[Tensor]:
    return [images.mean(), images.square().mean(), images.flatten(1).amax(dim=1).mean()]


def test_a_mean_is_over_pictures_not_batches() -> None:
    images = torch.randn(5, 3, 4, 4)
    found = mean_over([images[:3], images[3:]], figures, 3, DEVICE)
    torch.testing.assert_close(found, torch.stack(figures(images)))


@pytest.mark.parametrize("processes", [2, 3, 5])
def test_processes_share_the_batches_out_and_lose_no_bit(
    monkeypatch: pytest.MonkeyPatch, processes: int
) -> None:
    batches = list(torch.randn(8, 3, 4, 4).split([3, 3, 1, 1]))
    alone = mean_over(batches, figures, 3, DEVICE)
    parts, seen = list[Tensor](), list[int]()

    def counted(images: Tensor) -> list[Tensor]:
        seen.append(len(images))
        return figures(images)

    def kept(found: Tensor, reduction: str) -> Tensor:
        assert reduction == "sum"
        parts.append(found)
        return found

    monkeypatch.setattr(unseen, "reduce", kept)
    for process in range(processes):
        state = SimpleNamespace(process_index=process, num_processes=processes)
        monkeypatch.setattr(unseen, "PartialState", lambda state=state: state)
        mean_over(batches, counted, 3, DEVICE)
    assert sorted(seen) == [1, 1, 3, 3]  # each batch once
    assert torch.equal(sum(parts).sum(dim=0), alone)


def test_unseen_pictures_that_cannot_be_read_are_left_out_if_a_recipe_says_so() -> None:
    def read(key: int) -> int:
        if key % 2:
            raise DataError(f"{key} cannot be read")
        return 10 * key

    assert read_unseen(read, range(5), "skip") == [0, 20, 40]
    assert read_unseen(read, [], "skip") == []
    with pytest.raises(DataError, match="1 cannot be read"):
        read_unseen(read, range(5), "stop")
    with pytest.raises(DataError, match="none of the 2 unseen pictures can be read"):
        read_unseen(read, [1, 3], "skip")
