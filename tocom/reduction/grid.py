"""Reduction that knows where in the picture tokens are: fixed patterns, and merges of neighbours.

What happens depends on the grid of patches alone and on no picture. A model must therefore say
what its grid is: one that takes pictures of any size does not.

Letters: B images, N tokens in, M tokens out, h rows and w columns of patches.
Reference: the fixed patterns are those of Which Tokens to Use?, arXiv:2308.04657, section 3; the
merges of neighbours those of CAIT's asymmetric token merging (ATME), arXiv:2309.15755.
"""

from dataclasses import dataclass
from functools import cache
from itertools import accumulate, groupby
from typing import ClassVar

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from tocom.reduction.options import check_flag, check_one_of
from tocom.reduction.protocol import Cut, Fate, Heads, Method, Place, Seen, Tokens, Unit

Grid = tuple[int, int]

NORMS = ("l1", "l2", "linf")
AXES = ("horizontal", "vertical")


class OnGrid(Method):
    """A method on the input of a block, for which the grid of patches decides all."""

    place: ClassVar = Place.INPUT

    def refuse(self, model: VisionTransformer) -> str | None:
        """A model must have one grid and pass on all of it."""
        if model.dynamic_img_size:
            return (
                f"the method {self.name!r} needs to know the grid of patches, and the model takes "
                "pictures of any size (dynamic_img_size)"
            )
        if not isinstance(model.patch_drop, nn.Identity):
            return (
                f"the method {self.name!r} needs the whole grid of patches, and the model drops "
                "some in training (patch_drop_rate)"
            )
        return super().refuse(model)

    def macs(self, tokens: int, leaving: int, width: int, heads: Heads) -> int:
        """None: tokens are dropped or become means."""
        return 0


@dataclass(frozen=True)
class Pattern(OnGrid):
    """Keep the patches near the centre of the picture, whatever is there.

    Whole rings go: of the numbers of patches that can be left the nearest to what is asked for.

    Attributes:
        norm: by which patches are near: `"l1"`, a diamond; `"l2"`, a disc; `"linf"`, a square.
    """

    name: ClassVar = "pattern"
    unit: ClassVar = Unit.KEPT

    norm: str = "l2"

    def __post_init__(self) -> None:
        """Raise ReductionError if there is no such norm."""
        check_one_of(self.name, "norm", self.norm, NORMS)

    def leaving(self, amount: int, patches: int, grid: Grid) -> int:
        """Of the counts that whole rings leave, the nearest to `amount`."""
        return min(nearest_count(self.norm, grid, amount), patches)

    def reduce(self, tokens: Tokens, seen: Seen | None, cut: Cut) -> tuple[Tokens, Fate | None]:
        """Drop the outer rings."""
        x, prefix = tokens.x, cut.prefix
        runs = _runs(self.norm, cut.grid, prefix, x.shape[1] - prefix, cut.leaving - prefix)
        # Slices, for no index has to come from the host; together their gradient is one copy.
        kept = Tokens(torch.cat(x.split_with_sizes(runs, dim=1)[::2], dim=1))
        if not cut.trace:
            return kept, None
        into = torch.arange(cut.leaving, device=x.device).split_with_sizes(runs[::2])
        gone = into[0].new_full((x.shape[1] - cut.leaving,), -1).split_with_sizes(runs[1::2])
        pieces = [piece for pair in zip(into, gone, strict=True) for piece in pair]
        return kept, Fate(torch.cat(pieces).expand(x.shape[:2]))


@dataclass(frozen=True)
class ATME(OnGrid):
    """Merge neighbours in pairs, in rows and in columns by turns, by default into their means.

    An amount of more than 0 means one such merge. What stands alone at an odd end stays as it is,
    and where there is one column or row left, the others merge instead.

    Attributes:
        first: what merges first: `"horizontal"`, neighbours in a row; `"vertical"`, in a column.
        linear: whether a pair becomes what a linear layer, which is learned, makes of both.
    """

    name: ClassVar = "atme"
    unit: ClassVar = Unit.ONCE

    first: str = "horizontal"
    linear: bool = False

    def __post_init__(self) -> None:
        """Raise ReductionError if an option has a value that it cannot have."""
        check_one_of(self.name, "first", self.first, AXES)
        check_flag(self.name, "linear", self.linear)

    @property
    def learns(self) -> bool:  # type: ignore[override]
        """Whether the merges are learned."""
        return self.linear

    def start(self, width: int, most: int) -> dict[str, Tensor]:
        """A linear layer from two tokens to one; it begins as their mean."""
        if not self.linear:
            return {}
        return {"weight": torch.eye(width).repeat(1, 2) / 2, "bias": torch.zeros(width)}

    def amounts(self, strength: float, depth: int, patches: int) -> tuple[int, ...]:
        """Two merges, the second half-way from the first to the end; the earlier, the stronger."""
        first = round((1 - strength) * depth)
        return tuple(int(block in (first, (first + depth) // 2)) for block in range(depth))

    def leaving(self, amount: int, patches: int, grid: Grid) -> int:
        """Of each pair one."""
        rows, columns = merged_grid(*self._turn(patches, grid))
        return rows * columns

    def reduce(self, tokens: Tokens, seen: Seen | None, cut: Cut) -> tuple[Tokens, Fate | None]:
        """Merge once."""
        x, prefix = tokens.x, cut.prefix
        grid, axis = self._turn(x.shape[1] - prefix, cut.grid)
        patches = x[:, prefix:].reshape(x.shape[0], *grid, x.shape[2])
        layer = cut.learned or {}
        merged = merge_neighbours(patches, axis, layer.get("weight"), layer.get("bias"))
        merged = merged.flatten(1, 2)
        left = Tokens(torch.cat([x[:, :prefix], merged], dim=1))
        if not cut.trace:
            return left, None
        ids = torch.arange(x.shape[1], device=x.device)
        ids[prefix:] = prefix + merged_ids(grid, axis, x.device)
        return left, Fate(ids.expand(x.shape[:2]))

    def learned_macs(self, patches: int, left: int, width: int) -> int:
        """Of the linear layer."""
        return left * 2 * width**2 if self.linear else 0

    def _turn(self, patches: int, grid: Grid) -> tuple[Grid, str]:
        """Return the grid that `patches` tokens make after some merges, and what merges next."""
        axis = _possible(grid, self.first)
        while grid[0] * grid[1] > patches:
            grid = merged_grid(grid, axis)
            axis = _possible(grid, _other(axis))
        return grid, axis


def rings(norm: str, grid: Grid) -> tuple[int, ...]:
    """Return how far each patch is from the centre, row by row, in whole numbers.

    In halves of a patch's side; for `"l2"` squared. Equal is equal, which rounded distances
    are not.
    """
    rows, columns = grid
    across = [abs(2 * column - columns + 1) for column in range(columns)]
    down = [abs(2 * row - rows + 1) for row in range(rows)]
    if norm == "l1":
        return tuple(y + x for y in down for x in across)
    if norm == "l2":
        return tuple(y * y + x * x for y in down for x in across)
    return tuple(max(y, x) for y in down for x in across)


@cache
def ring_counts(norm: str, grid: Grid) -> tuple[int, ...]:
    """Return how many patches the 1, 2, ... innermost rings have together."""
    each = groupby(sorted(rings(norm, grid)))
    return tuple(accumulate(len(list(ring)) for _, ring in each))


def nearest_count(norm: str, grid: Grid, amount: int) -> int:
    """Return the number of patches of whole rings nearest to `amount`; of two the smaller."""
    return min(ring_counts(norm, grid), key=lambda count: (abs(count - amount), count))


def inside(norm: str, grid: Grid, count: int) -> tuple[bool, ...]:
    """Return for each patch, row by row, whether it is one of the `count` innermost.

    Args:
        norm: one of `NORMS`.
        grid: rows and columns.
        count: patches of whole rings, one of `ring_counts`.
    """
    far = rings(norm, grid)
    radius = sorted(far)[count - 1]
    return tuple(each <= radius for each in far)


def shrinking(
    norm: str, grid: Grid, depth: int, start: int, end: int, radius: float
) -> tuple[int, ...]:
    """Return amounts of a rung whose pattern shrinks from block to block.

    Args:
        norm: one of `NORMS`.
        grid: rows and columns.
        depth: number of blocks.
        start, end: the first block whose pattern is smaller, and the last.
        radius: in sides of a patch, what it would come down to in the block after `end`. It falls
            evenly from that of the whole grid in the block before `start`.
    """
    power = 2 if norm == "l2" else 1
    far = [each ** (1 / power) / 2 for each in rings(norm, grid)]
    whole, amounts = max(far), [0] * depth
    for block in range(start, end + 1):
        limit = whole - (whole - radius) * (block - start + 1) / (end - start + 2)
        # At least the innermost ring: 0 would leave the block alone.
        amounts[block] = sum(each <= max(limit, min(far)) for each in far)
    return tuple(amounts)


def merge_neighbours(
    x: Tensor, axis: str, weight: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """Merge neighbours in pairs; at an odd end the last merges with itself.

    Args:
        x: [B, h, w, C] tokens.
        axis: `"horizontal"`: [B, h, ceil(w / 2), C]; `"vertical"`: [B, ceil(h / 2), w, C].
        weight: [C, 2 C] from both, side by side, to their merged token; None: their mean.
        bias: [C] with a weight.
    """
    dim = 2 - AXES.index(axis)
    if x.shape[dim] % 2:
        x = torch.cat([x, x.narrow(dim, -1, 1)], dim=dim)
    pairs = x.reshape(*x.shape[:dim], -1, 2, *x.shape[dim + 1 :])
    if weight is None:
        return pairs.mean(dim=dim + 1)
    return F.linear(pairs.movedim(dim + 1, -2).flatten(-2), weight, bias)


def merged_grid(grid: Grid, axis: str) -> Grid:
    """Return the rows and columns after a merge of neighbours."""
    rows, columns = grid
    return (rows, -(-columns // 2)) if axis == "horizontal" else (-(-rows // 2), columns)


def merged_ids(grid: Grid, axis: str, device: torch.device) -> Tensor:
    """Return the merged token [h w] that holds each patch, row by row."""
    row = torch.arange(grid[0], device=device).unsqueeze(1)
    column = torch.arange(grid[1], device=device)
    if axis == "horizontal":
        column = column // 2
    else:
        row = row // 2
    return (row * merged_grid(grid, axis)[1] + column).flatten()


def _other(axis: str) -> str:
    return AXES[1 - AXES.index(axis)]


def _possible(grid: Grid, axis: str) -> str:
    """Return the other axis where this one has no neighbours."""
    return _other(axis) if merged_grid(grid, axis) == grid else axis


@cache
def _runs(norm: str, grid: Grid, prefix: int, patches: int, left: int) -> list[int]:
    """Return the lengths of runs of tokens that stay and that go, by turns, first one that stays.

    Args:
        norm: of the pattern.
        grid: rows and columns that entered the first block.
        prefix: tokens in front, which stay.
        patches: patch tokens that are there, of whole rings.
        left: how many of them stay.
    """
    there, stay = inside(norm, grid, patches), inside(norm, grid, left)
    kept = [True] * prefix + [
        inner for inner, is_there in zip(stay, there, strict=True) if is_there
    ]
    runs = [] if kept[0] else [0]
    runs += [len(list(run)) for _, run in groupby(kept)]
    return runs if len(runs) % 2 == 0 else [*runs, 0]
