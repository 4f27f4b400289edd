"""What a method of token reduction is, and what passes between it and the forward.

A method is a frozen, hashable value: its options. It acts in one place of a block. What it does
there is decided by the tokens, by what the block's attention saw and by a `Cut`, which holds all
that is known before any image.

Letters: B images, N tokens in, M tokens out, H heads, d their width.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import ClassVar, NamedTuple

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from tocom.merging import unrounded


class Place(Enum):
    """Where in a block a method acts."""

    INPUT = "input"  #: on what enters the block, before its first norm
    ATTENTION = "attention"  #: attention answers for some of its tokens only
    BETWEEN = "between"  #: between attention and MLP
    MLP = "mlp"  #: around the MLP, which alone has fewer tokens


class Unit(Enum):
    """What the amounts of a ladder's rung say, block by block; 0 leaves a block alone."""

    REMOVED = "removed"  #: tokens that go
    KEPT = "kept"  #: patch tokens that are left
    ONCE = "once"  #: whether to act; the method overrides `leaving`


class Tokens(NamedTuple):
    """What flows from block to block; prefix tokens first."""

    x: Tensor  # [B, N, D]
    size: Tensor | None = None  # [B, N, 1] input tokens that each stands for; None: one each
    live: Tensor | None = None  # [B, N] False: padding; None: all are tokens


class Fate(NamedTuple):
    """Where one block's tokens went."""

    into: Tensor  # [B, N] the output token that holds each input token, -1: dropped
    margin: Tensor | None = None  # [B] by how much the closest decision was taken
    # [B, N] as `into`, but -1 also where the token itself is a better guess for a dense grid
    dense: Tensor | None = None
    weight: Tensor | None = None  # [B, N, M] soft: shares of each input token in the output tokens
    before: Tensor | None = None  # [B, N, D] the tokens as they were; the forward notes it

    def follow(self, source: Tensor) -> Tensor:
        """Carry a map through this block.

        Args:
            source: [B, N0] the token, of those that enter it, that holds each input token; -1:
                dropped.

        Returns:
            [B, N0] the token that leaves it and holds each input token; -1: dropped.
        """
        after = self.into.gather(1, source.clamp(min=0))
        return after.masked_fill(source < 0, -1)

    def undone(self) -> "Fate":
        """Return that of tokens which are all there again, each in its place."""
        batch, tokens = self.into.shape
        return Fate(torch.arange(tokens, device=self.into.device).expand(batch, -1), self.margin)


class Chosen(NamedTuple):
    """The tokens that attention answers for."""

    rows: Tensor  # [B, M] their positions, prefix tokens first; padding repeats a position
    live: Tensor | None = None  # [B, M] False: padding
    margin: Tensor | None = None  # [B] by how much the closest decision was taken

    def fate(self, tokens: int) -> Fate:
        """Return where `tokens` tokens went: whoever is not chosen is dropped."""
        batch, left = self.rows.shape
        into = self.rows.new_full((batch, tokens + 1), -1)
        rows = self.rows if self.live is None else self.rows.masked_fill(~self.live, tokens)
        out = torch.arange(left, device=rows.device).expand(batch, left)
        return Fate(into.scatter(1, rows, out)[:, :tokens], self.margin)


class Cut(NamedTuple):
    """What one block of a rung is asked to do: known before any image."""

    block: int
    prefix: int  # tokens at the front that always stay
    leaving: int  # tokens that leave, prefix tokens included; at most, if pictures decide
    grid: tuple[int, int]  # rows and columns of patches that entered the first block
    trace: bool = False  # also say where the tokens go, and how close the decisions were
    learned: Mapping[str, Tensor] | None = None  # what a method that learns knows for the block


class Heads(NamedTuple):
    """The heads of a block's attention."""

    number: int
    width: int  # channels of a query and of a key

    @property
    def channels(self) -> int:
        """Of the queries of all heads."""
        return self.number * self.width


@dataclass(frozen=True, eq=False)
class Seen:
    """What the attention of a block saw, from which methods score tokens.

    What is derived is computed anew each time that it is read.

    Attributes:
        q: [B, H, N, d] queries.
        k: [B, H, N, d] keys.
        v: [B, H, N, d] values.
        bias: [B, 1, 1, N] what is added to the scores of each key: log sizes, -inf for padding.
        scale: of the scores.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor | None
    scale: float

    @property
    def mean_key(self) -> Tensor:
        """[B, N, d] the mean of the keys over the heads, in fp32 whatever the keys are."""
        return self.k.mean(dim=1, dtype=torch.float32)

    @property
    def class_rows(self) -> Tensor:
        """[B, H, N] the attention of the class token, in fp32."""
        return self._attention(self.q[:, :, :1]).squeeze(2)

    @property
    def class_attention(self) -> Tensor:
        """[B, N] the attention of the class token, mean over the heads, in fp32."""
        return self.class_rows.mean(dim=1)

    @property
    def received(self) -> Tensor:
        """[B, N] the attention that each token receives, mean over heads and tokens, in fp32."""
        return self._attention(self.q).mean(dim=(1, 2))

    def _attention(self, q: Tensor) -> Tensor:
        with unrounded(q):
            scores = (q.float() * self.scale) @ self.k.float().transpose(-2, -1)
        return (scores if self.bias is None else scores + self.bias.float()).softmax(dim=-1)


class Method(ABC):
    """How tokens are reduced. Subclasses are frozen dataclasses; their fields are its options.

    Attributes:
        name: what ladders and programs call it.
        place: where in a block it acts; a method of `Place.ATTENTION` overrides `choose`, the
            others `reduce`. One of `Place.MLP` always says where the tokens went.
        unit: what the amounts of its ladders say.
        sizes: whether it counts the input tokens that each token stands for; these weigh in
            attention (if it is proportional) and in the mean of all tokens.
        needs_class: whether it reads the attention of the class token.
        by_picture: whether pictures decide how many tokens leave, up to a bound.
        looks_back: whether it reads the attention of the block before, and so leaves the first
            block alone.
        learns: whether it needs weights of its own, which `start` begins.
        in_bank: whether they are learned without labels, and are part of a bank; else of a model.
        steps: rungs of its paper's ladder, of evenly rising strength; None: it has none.
    """

    name: ClassVar[str]
    place: ClassVar[Place]
    unit: ClassVar[Unit]
    sizes: ClassVar[bool] = False
    needs_class: ClassVar[bool] = False
    by_picture: ClassVar[bool] = False
    looks_back: ClassVar[bool] = False
    learns: ClassVar[bool] = False
    in_bank: ClassVar[bool] = False
    steps: ClassVar[int | None] = None

    def refuse(self, model: VisionTransformer) -> str | None:
        """Return why a backbone cannot have the method; None if it can."""
        if self.needs_class and not model.has_class_token:
            return f"the method {self.name!r} reads the class token, and the model has none"
        return None

    def leaving(self, amount: int, patches: int, grid: tuple[int, int]) -> int:
        """Return how many patch tokens leave a block.

        Args:
            amount: what the rung says of it, more than 0.
            patches: patch tokens that enter the block.
            grid: rows and columns of patches that entered the first block.
        """
        left = patches - amount if self.unit is Unit.REMOVED else amount
        return max(self.fewest(patches), min(left, patches))

    def fewest(self, patches: int) -> int:
        """Return the fewest of `patches` tokens that it can leave in one block."""
        return min(1, patches)

    def amounts(self, strength: float, depth: int, patches: int) -> tuple[int, ...]:
        """Return its usual schedule: what it does in each of `depth` blocks.

        By default as many tokens go in every block if amounts are tokens that go; else a share
        stays at each of three stages, at the start of the second, third and last quarter.

        Args:
            strength: 0 keeps everything, 1 as little as can be.
            depth: number of blocks.
            patches: patch tokens that enter the first block.
        """
        if self.unit is Unit.REMOVED:
            return (round(strength * patches / 2),) * depth
        stages = [max(1, depth // 4), depth // 2, 3 * depth // 4]
        left = {at: int(patches * (1 - strength) ** (i + 1)) for i, at in enumerate(stages)}
        return tuple(max(1, left[i]) if i in left else 0 for i in range(depth))

    def reduce(self, tokens: Tokens, seen: Seen | None, cut: Cut) -> tuple[Tokens, Fate | None]:
        """Return the tokens that are left, and where all went if `cut.trace` asks for it.

        Args:
            tokens: N tokens.
            seen: by the attention of this block, of these tokens; for a method on the block's
                input by that of the block before, and None in the first.
            cut: what to do.
        """
        raise NotImplementedError

    def choose(self, tokens: Tokens, seen: Seen, cut: Cut) -> Chosen:
        """Return the tokens that this block's attention answers for, and so leave it."""
        raise NotImplementedError

    def start(self, width: int, most: int) -> dict[str, Tensor]:
        """Return the weights that a block begins to learn with, by name; random ones are drawn.

        Args:
            width: channels of a token.
            most: the most patch tokens that leave the block on any rung.
        """
        return {}

    def learned_macs(self, patches: int, left: int, width: int) -> int:
        """Return the multiply-adds of what it has learned, per image, beside `macs`.

        Args:
            patches: patch tokens that enter.
            left: patch tokens that leave.
            width: D.
        """
        return 0

    @abstractmethod
    def macs(self, tokens: int, leaving: int, width: int, heads: Heads) -> int:
        """Return the multiply-adds of reducing itself, per image.

        Args:
            tokens: N, prefix tokens included.
            leaving: M, prefix tokens included.
            width: D.
            heads: of the block's attention.
        """
