"""A ladder: what each rate means, as a value.

Rung 0 is the stock model; each rung says, block by block, how many tokens its method removes or
keeps. The paper's ladder, `TOME`, has no end: at rate r, r tokens merge in every block.

Does not look at images or weights: token counts depend on the rate alone, so that buffers, graphs
and batch shapes can be made ahead.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from tocom.errors import RateError, ReductionError
from tocom.reduction import Cut, Method, Place, ReductionWeights, ToMe, Unit
from tocom.reduction.weights import weights_of
from tocom.schedule import Rate, schedule


@dataclass(frozen=True)
class Plan:
    """Token counts of one forward.

    Attributes:
        tokens_in: tokens that enter the first block, prefix tokens included.
        prefix: tokens at the front that are never reduced.
        asked: what the rate asks of each block: tokens to remove, or to keep, as the method has
            it; 0: nothing.
        removed: tokens that each block does remove; the least, where pictures decide. Around the
            MLP, from what that sees.
        acts: whether each block does anything.
        grid: rows and columns of patches; one row where they are of no interest.
        restored: whether all tokens are there again after the MLP of each block.
    """

    tokens_in: int
    prefix: int
    asked: tuple[int, ...]
    removed: tuple[int, ...]
    acts: tuple[bool, ...]
    grid: tuple[int, int] = field(compare=False)  # counts and acts follow from it
    restored: bool = False

    @property
    def tokens(self) -> tuple[int, ...]:
        """Tokens that leave each block; the most, where pictures decide."""
        return (self.tokens_in,) * len(self.removed) if self.restored else self.reduced

    @property
    def reduced(self) -> tuple[int, ...]:
        """Tokens that the MLP of each block sees; the most, where pictures decide."""
        if self.restored:
            return tuple(self.tokens_in - removed for removed in self.removed)
        return tuple(self.tokens_in - gone for gone in accumulate(self.removed))

    @property
    def clipped(self) -> bool:
        """Whether some block removes fewer tokens than a rate that says what to remove asks for."""
        return self.asked != self.removed

    def cuts(
        self, trace: bool = False, learned: Callable[[int], Mapping[str, Tensor]] | None = None
    ) -> tuple[Cut | None, ...]:
        """Return what each block is to do; None: nothing.

        Args:
            trace: whether to follow tokens.
            learned: returns what the method has learned for a block; None: it learns nothing.
        """
        return tuple(
            Cut(i, self.prefix, leaving, self.grid, trace, learned and learned(i)) if acts else None
            for i, (leaving, acts) in enumerate(zip(self.reduced, self.acts, strict=True))
        )


@dataclass(frozen=True)
class Ladder:
    """Rungs of ever cheaper forwards by one method; equal if all of it is.

    Attributes:
        name: what requests and programs call it.
        method: how tokens are reduced.
        rungs: the amounts of each rung, in its method's unit, one a block; 0 leaves a block
            alone, and so does all of rung 0. None: a rate says by itself what is removed, as in
            `schedule`.
        patches: patch tokens of the pictures that the amounts are for. With other numbers of
            them amounts change in proportion.
    """

    name: str
    method: Method
    rungs: tuple[tuple[int, ...], ...] | None = None
    patches: int = 0

    def __post_init__(self) -> None:
        """Raise ReductionError if it is malformed."""
        if self.rungs is None:
            if self.method.unit is not Unit.REMOVED:
                raise ReductionError(
                    f"the ladder {self.name!r} needs rungs: its method says what is kept"
                )
            return
        if not self.rungs or self.patches < 1:
            raise ReductionError(f"the ladder {self.name!r} needs a rung 0 and a count of patches")
        if any(self.rungs[0]):
            raise ReductionError(
                f"rung 0 of the ladder {self.name!r} must be the stock model, all 0, got "
                f"{list(self.rungs[0])}"
            )
        for i, rung in enumerate(self.rungs):
            if len(rung) != len(self.rungs[0]):
                raise ReductionError(
                    f"all rungs of the ladder {self.name!r} must be for {len(self.rungs[0])} "
                    f"blocks, rung {i} is for {len(rung)}"
                )
            for amount in rung:
                if isinstance(amount, bool) or not isinstance(amount, int) or amount < 0:
                    raise ReductionError(
                        f"amounts must be whole numbers of 0 or more, got {amount!r} in rung {i} "
                        f"of the ladder {self.name!r}"
                    )
            if self.method.looks_back and rung and rung[0]:
                raise ReductionError(
                    f"the method {self.method.name!r} reads the attention of the block before, so "
                    f"rung {i} of the ladder {self.name!r} must have 0 for the first block, got "
                    f"{rung[0]}"
                )

    # A ladder is part of many keys, and its rungs are long.
    @cached_property
    def _hash(self) -> int:
        return hash((self.name, self.method, self.rungs, self.patches))

    def __hash__(self) -> int:
        return self._hash

    @property
    def top(self) -> int | None:
        """The cheapest rung; None: there is no last one."""
        return None if self.rungs is None else len(self.rungs) - 1

    def amounts(self, rate: Rate, depth: int, patches: int) -> tuple[int, ...]:
        """Return what `rate` says of each of `depth` blocks, for pictures of `patches` patches.

        Raises:
            RateError: if it has no such rung.
            ReductionError: if it is for another number of blocks.
        """
        if self.rungs is None:
            return schedule(rate, depth)
        if isinstance(rate, bool) or not isinstance(rate, int) or not 0 <= rate < len(self.rungs):
            raise RateError(
                f"the rates of the ladder {self.name!r} are 0 to {self.top}, got {rate!r}"
            )
        rung = self.rungs[rate]
        if len(rung) != depth:
            raise ReductionError(
                f"the ladder {self.name!r} is for {len(rung)} blocks, the model has {depth}"
            )
        if patches == self.patches:
            return rung
        # Whole numbers, rounded to the nearest; what acts, acts.
        scaled = ((2 * each * patches + self.patches) // (2 * self.patches) for each in rung)
        return tuple(max(1, new) if each else 0 for each, new in zip(rung, scaled, strict=True))

    def plan(
        self, rate: Rate, depth: int, tokens: int, prefix: int, grid: tuple[int, int] | None = None
    ) -> Plan:
        """Return the plan of a forward at `rate`.

        Args:
            rate: a rung; on a ladder without rungs anything that `schedule` takes.
            depth: number of blocks.
            tokens: tokens that enter the first block, prefix tokens included.
            prefix: class, distillation and register tokens, which are never reduced.
            grid: rows and columns of patches; None: of no method's interest.

        Raises:
            RateError: if it has no such rung, or the rate is malformed.
            ReductionError: if it is for another number of blocks.
        """
        left = tokens - prefix
        grid = grid or (1, left)
        amounts = self.amounts(rate, depth, left)
        removed, acts = [], []
        restored = self.method.place is Place.MLP
        for amount in amounts:
            leaving = self.method.leaving(amount, left, grid) if amount else left
            removed.append(left - leaving)
            acts.append(leaving < left or (amount > 0 and self.method.by_picture))
            left = left if restored else leaving
        return Plan(tokens, prefix, amounts, tuple(removed), tuple(acts), grid, restored)

    def start(self, depth: int, width: int, grid: tuple[int, int]) -> dict[str, Tensor]:
        """Return the weights that its method begins to learn with, as `ReductionWeights` has them.

        They are for all rungs: those of every block that acts on any, and for as many tokens as
        the rung leaves that leaves the most. Of a method that learns nothing there are none.

        Args:
            depth: number of blocks.
            width: channels of a token.
            grid: rows and columns of patches.

        Raises:
            ReductionError: if it is for another number of blocks.
        """
        if not self.method.learns:
            return {}
        most: dict[int, int] = {}
        for rung in range(1, 2 if self.rungs is None else len(self.rungs)):
            plan = self.plan(rung, depth, grid[0] * grid[1], 0, grid)
            for i, (left, acts) in enumerate(zip(plan.tokens, plan.acts, strict=True)):
                if acts:
                    most[i] = max(left, most.get(i, 0))
        return {
            f"{i}.{name}": tensor
            for i, left in sorted(most.items())
            for name, tensor in self.method.start(width, left).items()
        }

    def shapes(self, depth: int, width: int, grid: tuple[int, int]) -> dict[str, tuple[int, ...]]:
        """Return the name and shape of each of its method's weights; see `start`."""
        with torch.device("meta"):  # nothing is drawn
            return {name: tuple(x.shape) for name, x in self.start(depth, width, grid).items()}

    def check_learned(self, model: VisionTransformer, learned: ReductionWeights | None) -> None:
        """Raise ReductionError, saying why, if its method learns and cannot run with weights.

        Args:
            model: that is to run on it.
            learned: the weights that come with the model.
        """
        if not self.method.learns:
            return
        grid = model.patch_embed.grid_size
        for name, shape in self.shapes(len(model.blocks), model.embed_dim, grid).items():
            block, _, part = name.partition(".")
            there = tuple(weights_of(learned, self.method, int(block))[part].shape)
            # Of a table the first rows do.
            if there[1:] != shape[1:] or there[0] < shape[0]:
                raise ReductionError(
                    f"the ladder {self.name!r} needs {part} of block {block} as {list(shape)}, "
                    f"and {list(there)} were learned: a learned method runs on the ladder that it "
                    "was tuned on"
                )

    def check(self, model: VisionTransformer) -> None:
        """Raise ReductionError, saying why, if a model cannot run it."""
        if (reason := self.method.refuse(model)) is not None:
            raise ReductionError(reason)
        self.amounts(0, len(model.blocks), model.patch_embed.num_patches)


#: The paper's: at rate r, r tokens merge in every block.
TOME = Ladder("tome", ToMe())


def even_ladder(method: Method, model: VisionTransformer, steps: int, name: str) -> Ladder:
    """Return a method's ladder of so many rungs, of evenly rising strength."""
    depth, patches = len(model.blocks), model.patch_embed.num_patches
    rungs = [method.amounts(rung / steps, depth, patches) for rung in range(1, steps + 1)]
    return Ladder(name, method, ((0,) * depth, *rungs), patches)


def plan(rate: Rate, depth: int, tokens: int, prefix: int) -> Plan:
    """Return the plan of a forward at `rate` on the paper's ladder; see `Ladder.plan`.

    A block removes at most half of the tokens that may merge, `(N - prefix) // 2`; where that
    bites, `Plan.clipped` is true.
    """
    return TOME.plan(rate, depth, tokens, prefix)
