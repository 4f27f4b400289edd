"""Merging around the MLP: it sees fewer tokens, and all of them are there again after it.

So attention sees every token in every block, and there is a token for each patch at the end, as
dense answers want it.

Reference: Token Compensator (ToCom), arXiv:2408.06798, appendix, where rung r of 16 merges 32 r of
1,024 patches. That what the MLP adds is unmerged, not its sum with the merged tokens, is ours: so
tokens that merged do not become alike for good.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

from tocom.reduction.options import check_number, check_one_of
from tocom.reduction.protocol import Cut, Fate, Heads, Method, Place, Seen, Tokens, Unit
from tocom.reduction.tome import METRICS, WEIGHTS, ToMe


@dataclass(frozen=True)
class AroundMLP(Method):
    """Merge before each MLP by ToMe, and unmerge after it.

    Attributes:
        importance, metric, weight: as in `ToMe`; each token stands for one input token.
    """

    name: ClassVar = "around-mlp"
    place: ClassVar = Place.MLP
    unit: ClassVar = Unit.REMOVED
    steps: ClassVar = 16

    importance: float = 0.0
    metric: str = "keys"
    weight: str = "size"

    def __post_init__(self) -> None:
        """Raise ReductionError if an option is malformed."""
        check_number(self.name, "importance", self.importance)
        check_one_of(self.name, "metric", self.metric, METRICS)
        check_one_of(self.name, "weight", self.weight, WEIGHTS)

    @cached_property
    def merging(self) -> ToMe:
        """The method that it is around the MLP."""
        return ToMe(self.importance, metric=self.metric, weight=self.weight)

    @property
    def needs_class(self) -> bool:  # type: ignore[override]
        """Whether it reads the attention of the class token."""
        return self.merging.needs_class

    def fewest(self, patches: int) -> int:
        """As of ToMe."""
        return self.merging.fewest(patches)

    def reduce(self, tokens: Tokens, seen: Seen | None, cut: Cut) -> tuple[Tokens, Fate | None]:
        """Match and merge."""
        assert seen is not None
        left, match = self.merging.merged(tokens, seen, cut)
        return left, Fate(match.assignment, match.margin)

    def macs(self, tokens: int, leaving: int, width: int, heads: Heads) -> int:
        """As of ToMe."""
        return self.merging.macs(tokens, leaving, width, heads)
