"""Token Merging by a metric that is learned: DTEM.

What tells which tokens are alike need not be what the next layer works with. Here one linear layer
a block makes it of the tokens. How that learns, without labels, is the trainer's; its weights are
part of a bank.

Reference: Decoupled Token Embedding for Merging (DTEM), arXiv:2412.10569, section 3. That the layer
reads the tokens that merge, not the input of the block's attention, and the options are ours.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from tocom.merging import unrounded
from tocom.reduction.options import check_number, check_one_of, check_whole
from tocom.reduction.protocol import Cut, Fate, Heads, Method, Place, Seen, Tokens, Unit
from tocom.reduction.tome import WEIGHTS, ToMe


@dataclass(frozen=True)
class DTEM(Method):
    """Merge by ToMe the tokens that a learned metric says are alike.

    Attributes:
        importance, size, weight: as in `ToMe`.
        channels: of the metric.
    """

    name: ClassVar = "dtem"
    place: ClassVar = Place.BETWEEN
    unit: ClassVar = Unit.REMOVED
    sizes: ClassVar = True
    learns: ClassVar = True
    in_bank: ClassVar = True

    importance: float = 0.0
    size: float = 0.0
    weight: str = "size"
    channels: int = 64

    def __post_init__(self) -> None:
        """Raise ReductionError if an option is malformed."""
        check_number(self.name, "importance", self.importance)
        check_number(self.name, "size", self.size)
        check_one_of(self.name, "weight", self.weight, WEIGHTS)
        check_whole(self.name, "channels", self.channels, least=1)

    @cached_property
    def merging(self) -> ToMe:
        """The method that merges."""
        return ToMe(self.importance, self.size, weight=self.weight)

    @property
    def needs_class(self) -> bool:  # type: ignore[override]
        """Whether it reads the attention of the class token."""
        return self.merging.needs_class

    def fewest(self, patches: int) -> int:
        """As of ToMe."""
        return self.merging.fewest(patches)

    def start(self, width: int, most: int) -> dict[str, Tensor]:
        """A linear layer, at PyTorch's start."""
        layer = nn.Linear(width, self.channels)
        return {"weight": layer.weight.detach(), "bias": layer.bias.detach()}

    def reduce(self, tokens: Tokens, seen: Seen | None, cut: Cut) -> tuple[Tokens, Fate | None]:
        """Match by the learned metric, and merge."""
        assert seen is not None
        left, match = self.merging.merged(tokens, seen, cut, self.metric(tokens.x, cut))
        return left, Fate(match.assignment, match.margin) if cut.trace else None

    def metric(self, x: Tensor, cut: Cut) -> Tensor:
        """Return what is compared [B, N, channels] of tokens x [B, N, D], in fp32.

        No gradient goes to the tokens: the metric learns beside the model.
        """
        assert cut.learned is not None
        with unrounded(x):
            weight, bias = (cut.learned[part].float() for part in ("weight", "bias"))
            return F.linear(x.detach().float(), weight, bias)

    def macs(self, tokens: int, leaving: int, width: int, heads: Heads) -> int:
        """Of the metric, of the similarity of the two sets, and of the class token's attention."""
        pairs = (tokens + 1) // 2 * (tokens // 2)
        matching = (tokens * width + pairs) * self.channels
        return matching + (tokens * heads.channels if self.needs_class else 0)
