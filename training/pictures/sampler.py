"""Which pictures a step sees: a function of (seed, step), shared out to processes.

So a run resumes at any step without replaying what went before, and the number of training
processes changes nothing.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from tocom import ConfigError
from training.seeds import derive


@dataclass(frozen=True)
class Draw:
    """One picture to read: where it stands, and what its augmentation is a function of."""

    part: int
    index: int
    position: int = 0  # in the run
    seed: int = 0  # of the run


@dataclass(frozen=True)
class Shares:
    """How a step's batch is shared out: one micro-batch for each process and accumulation."""

    processes: int = 1
    process: int = 0
    accumulation: int = 1


class StepSampler:
    """The draws of every micro-batch from step `start` on: epoch after epoch, shuffled anew.

    Each process asks for its own micro-batches, one for each accumulation. So two processes, or
    two accumulations, see halves of the batches that one process sees.

    Args:
        keys: (part, index), repeated as often as each picture counts in an epoch.
        batch_size: pictures a step, of all processes and accumulations.
        steps: number of the last step + 1.
        start: first step to draw for.
        seed: of the order and of the augmentations.
        repeats: draws of a picture in a row, each augmented anew.
        shares: which of the micro-batches to yield.

    Raises:
        ConfigError: if the batch cannot be shared out evenly.
    """

    def __init__(
        self,
        keys: Sequence[tuple[int, int]],
        batch_size: int,
        steps: int,
        start: int,
        seed: int,
        repeats: int = 1,
        shares: Shares = Shares(),
    ) -> None:
        """Remember the arguments; nothing is drawn yet."""
        self.size, rest = divmod(batch_size, shares.processes * shares.accumulation)
        if rest:
            raise ConfigError(
                f"a batch of {batch_size} pictures cannot be shared out to {shares.processes} "
                f"processes x {shares.accumulation} accumulations; give a multiple of "
                f"{shares.processes * shares.accumulation}"
            )
        self.keys, self.seed, self.repeats, self.shares = keys, seed, repeats, shares
        self.batch_size = batch_size
        self.steps = range(start, steps)

    def __iter__(self) -> Iterator[list[Draw]]:
        """Yield the draws of each micro-batch."""
        epoch, order = -1, list[int]()
        for first in self._firsts():
            draws = []
            for position in range(first, first + self.size):
                now, place = divmod(position // self.repeats, len(self.keys))
                if now != epoch:
                    epoch, order = now, self._order(now)
                part, index = self.keys[order[place]]
                draws.append(Draw(part, index, position, self.seed))
            yield draws

    def __len__(self) -> int:
        """Return the number of micro-batches left."""
        return len(self.steps) * self.shares.accumulation

    def _firsts(self) -> Iterator[int]:
        """Yield the first position of each micro-batch."""
        for step in self.steps:
            for accumulated in range(self.shares.accumulation):
                micro = accumulated * self.shares.processes + self.shares.process
                yield step * self.batch_size + micro * self.size

    def _order(self, epoch: int) -> list[int]:
        generator = torch.Generator().manual_seed(derive(self.seed, "order", epoch))
        order: list[int] = torch.randperm(len(self.keys), generator=generator).tolist()
        return order
