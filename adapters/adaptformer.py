"""AdaptFormer's branches as parameters, for tuning.

Reference: AdaptFormer, arXiv:2205.13535, section 3.2; ToCom, section 4.1, whose branch has no
biases: x' = x + FFN(LN(x)) + s ReLU(x W_down) W_up.
"""

import math

import torch
from torch import Tensor, nn

from tocom import Adapter, LowRank


class AdaptFormer(nn.Module):
    """One bottleneck for each block. W_down starts random, W_up at zero: it changes nothing yet."""

    def __init__(self, depth: int, width: int, bottleneck: int = 32, scale: float = 0.1) -> None:
        """Make the parameters.

        Args:
            depth: blocks L.
            width: channels D of a token.
            bottleneck: channels K of the branch.
            scale: the factor s of its answer; searched, not learned.
        """
        super().__init__()
        self.scale = scale
        self.down = nn.Parameter(torch.empty(depth, bottleneck, width))
        self.up = nn.Parameter(torch.zeros(depth, width, bottleneck))
        # nn.Linear's own start, as in the reference: fan-in is the width.
        nn.init.uniform_(self.down, -1 / math.sqrt(width), 1 / math.sqrt(width))

    def forward(self) -> Adapter:
        """Return the branches, through which gradients reach the parameters."""
        return adapter(self.down, self.up, self.scale)


def adapter(down: Tensor, up: Tensor, scale: float) -> Adapter:
    """Return the branches of down [L, K, D] and up [L, D, K]; the scale goes into `up`."""
    return Adapter([LowRank(*pair) for pair in zip(down, scale * up, strict=True)])
