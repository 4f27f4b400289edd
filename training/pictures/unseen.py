"""What is measured on held-out pictures while a run goes on: shared out to its processes.

Otherwise the first process would measure and all others wait for it, some of them for longer than
the time after which torch ends a run.
"""

from collections.abc import Callable, Sequence

import torch
from accelerate import PartialState
from accelerate.utils import reduce
from torch import Tensor

from training.screen.progress import following


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
