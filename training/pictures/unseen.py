"""What is measured on held-out pictures while a run goes on: shared out to its processes.

Otherwise the first process would measure and all others wait for it, some of them for longer than
the time after which torch ends a run.
"""

import logging
from collections.abc import Callable, Sequence
from typing import Literal, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import reduce
from torch import Tensor

from tocom import DataError
from training.screen.progress import following

Key = TypeVar("Key")
Item = TypeVar("Item")
_log = logging.getLogger(__name__)


def read_unseen(
    read: Callable[[Key], Item],
    keys: Sequence[Key],
    on_unreadable: Literal["stop", "skip"],
) -> list[Item]:
    """Return the pictures that are watched.

    Args:
        read: returns the picture of a key.
        keys: of all of them.
        on_unreadable: `skip` leaves out those that cannot be read; none stands in for them.

    Raises:
        DataError: if one cannot be read and shall not be left out, or if none can.
    """

    def tried(key: Key) -> Item | None:
        try:
            return read(key)
        except DataError as error:
            if on_unreadable == "stop":
                raise
            _log.warning("%s; it is not watched", error)
            return None

    every = map(tried, following(keys, "reading unseen pictures", "picture"))
    found = [item for item in every if item is not None]
    if keys and not found:
        raise DataError(f"none of the {len(keys)} unseen pictures can be read")
    return found


@torch.no_grad()
def mean_over(
    batches: Sequence[Tensor],
    figures: Callable[[Tensor], Sequence[Tensor]],
    count: int,
    device: torch.device,
) -> Tensor:
    """Return the mean over all pictures of figures of their batches.

    All processes call it, each measures batches of its own, and all get the same answer: to the
    last bit that of one process.

    Args:
        batches: [B, 3, H, W] each, the same in all processes.
        figures: of a batch on the device; means over its pictures.
        count: how many figures there are.
        device: of the model.

    Returns:
        [count] on the device.
    """
    state, pictures = PartialState(), sum(map(len, batches))
    found = torch.zeros(len(batches), count, device=device)
    mine = range(state.process_index, len(batches), state.num_processes)
    for i in following(mine, "unseen pictures", "batch"):
        share = len(batches[i]) / pictures
        found[i] = share * torch.stack(list(figures(batches[i].to(device))))
    total: Tensor = reduce(found, reduction="sum").sum(dim=0)
    return total
