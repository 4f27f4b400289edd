"""Adapters: a small branch beside the MLP of every block, tuned for a task.

A plain value that goes into the forward call beside the delta; the model is never changed, so
that tasks share its weights. The branch reads the tokens that the MLP reads, merged ones as they
are, before the norm.

Reference: AdaptFormer, arXiv:2205.13535, section 3; ToCom, section 4.1.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from tocom.delta import LowRank


@dataclass(frozen=True, eq=False)
class Adapter:
    """Branches of a model, one for each block; equal to itself only.

    Attributes:
        branches: for each block down [K, D] and up [D, K], the scale included in `up`.
    """

    branches: Sequence[LowRank]

    @property
    def bottleneck(self) -> int:
        """The width K of the branches."""
        return self.branches[0].down.shape[0]

    def __call__(self, block: int, x: Tensor) -> Tensor:
        """Return what the branch of a block adds to its tokens x [B, N, D]."""
        down, up = self.branches[block]
        return F.linear(F.relu(F.linear(x, down)), up)
