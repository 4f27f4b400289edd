"""Methods that are learned with the model: DynamicViT, SiT, PatchMerger and Sinkhorn.

All act on the input of a block. DynamicViT keeps tokens as they are; the others make new ones, each
a sum over all patch tokens. Where these go by a table of K rows, a rung that leaves fewer tokens
takes the first of them. Names of weights are those of the published codes. Does not learn: that is
the trainer's.

Letters: B images, N tokens in, P patch tokens in, K patch tokens out, C channels.
Reference: DynamicViT, arXiv:2106.02034, section 3; Self-slimmed ViT (SiT), arXiv:2111.12624,
section 3; PatchMerger, arXiv:2202.12015, section 3; Sinkhorn as in Which Tokens to Use?,
arXiv:2308.04657, section 3.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tocom.errors import ReductionError
from tocom.merging import unrounded
from tocom.reduction.attentive import most_of, take
from tocom.reduction.clusters import joined
from tocom.reduction.options import check_above_zero, check_flag, check_whole
from tocom.reduction.protocol import Cut, Fate, Heads, Method, Place, Seen, Tokens, Unit

Weights = Mapping[str, Tensor]


class Learned(Method):
    """A method on the input of a block that has weights of its own."""

    place: ClassVar = Place.INPUT
    unit: ClassVar = Unit.KEPT
    learns: ClassVar = True

    def macs(self, tokens: int, leaving: int, width: int, heads: Heads) -> int:
        """None beside what is learned."""
        return 0


@dataclass(frozen=True)
class DynamicViT(Learned):
    """Keep the K patch tokens to which a small network gives the highest scores; drop the others.

    The network is for one block and for any K. What is left stands in order of falling score.
    """

    name: ClassVar = "dynamicvit"

    def start(self, width: int, most: int) -> dict[str, Tensor]:
        """A LayerNorm and four linear layers, at PyTorch's start."""
        return _named(
            {
                "in_conv.0": nn.LayerNorm(width),
                "in_conv.1": nn.Linear(width, width),
                "out_conv.0": nn.Linear(width, width // 2),
                "out_conv.2": nn.Linear(width // 2, width // 4),
                "out_conv.4": nn.Linear(width // 4, 2),
            }
        )

    def reduce(self, tokens: Tokens, seen: Seen | None, cut: Cut) -> tuple[Tokens, Fate | None]:
        """Score and keep."""
        assert cut.learned is not None
        votes = keep_votes(tokens.x[:, cut.prefix :], cut.learned)
        # As the logarithm of the softmax ranks them, but never rounded to a tie at 0.
        kept = most_of((votes[..., 0] - votes[..., 1]).float(), cut.leaving, cut)
        left = Tokens(take(tokens.x, kept.rows))
        return left, kept.fate(tokens.x.shape[1]) if cut.trace else None

    def learned_macs(self, patches: int, left: int, width: int) -> int:
        """Of the linear layers."""
        half, quarter = width // 2, width // 4
        return patches * (width * width + width * half + half * quarter + quarter * 2)


@dataclass(frozen=True)
class SiT(Learned):
    """Replace the patch tokens by K sums of all, whose shares a small network gives."""

    name: ClassVar = "sit"

    def start(self, width: int, most: int) -> dict[str, Tensor]:
        """A LayerNorm and two linear layers, at PyTorch's start, and a scale of 1."""
        layers = {
            "weight.0": nn.LayerNorm(width),
            "weight.1": nn.Linear(width, width // 2),
            "weight.3": nn.Linear(width // 2, most),
        }
        return _named(layers) | {"scale": torch.ones(1, 1, 1)}

    def reduce(self, tokens: Tokens, seen: Seen | None, cut: Cut) -> tuple[Tokens, Fate | None]:
        """Share out and sum."""
        assert cut.learned is not None
        x = tokens.x[:, cut.prefix :]
        shares = sit_shares(x, cut.learned, cut.leaving - cut.prefix)
        return joined(tokens.x, shares @ x, shares.argmax(dim=1), cut, shares)

    def learned_macs(self, patches: int, left: int, width: int) -> int:
        """Of the linear layers and of the sums."""
        half = width // 2
        return patches * (width * half + half * left) + left * patches * width


@dataclass(frozen=True)
class PatchMerger(Learned):
    """Replace the patch tokens by what K learned queries read of them, normalised.

    Attributes:
        scaled: whether scores are divided by the root of the number of channels.
    """

    name: ClassVar = "patchmerger"

    scaled: bool = False

    def __post_init__(self) -> None:
        """Raise ReductionError if the option has a value that it cannot have."""
        check_flag(self.name, "scaled", self.scaled)

    def start(self, width: int, most: int) -> dict[str, Tensor]:
        """A LayerNorm at its start and queries from a normal distribution."""
        return _named({"norm": nn.LayerNorm(width)}) | {"queries": torch.randn(most, width)}

    def reduce(self, tokens: Tokens, seen: Seen | None, cut: Cut) -> tuple[Tokens, Fate | None]:
        """Normalise and read."""
        assert cut.learned is not None
        x = _normed(tokens.x[:, cut.prefix :], "norm", cut.learned)
        shares = query_shares(x, cut.learned["queries"], cut.leaving - cut.prefix, self.scaled)
        return joined(tokens.x, (shares @ x).to(tokens.x.dtype), shares.argmax(dim=1), cut, shares)

    def learned_macs(self, patches: int, left: int, width: int) -> int:
        """Of the scores and of the sums."""
        return 2 * left * patches * width


@dataclass(frozen=True)
class Sinkhorn(Learned):
    """Replace the patch tokens by K sums of their directions, by optimal transport to K centres.

    The directions count, not the lengths; a token's shares in all sums add up to 1.

    Attributes:
        eps: how soft the assignment is: the entropy's weight.
        iterations: how often the shares are balanced, first those of centres, then of tokens.
    """

    name: ClassVar = "sinkhorn"

    eps: float = 1.0
    iterations: int = 3

    def __post_init__(self) -> None:
        """Raise ReductionError if an option has a value that it cannot have."""
        check_above_zero(self.name, "eps", self.eps)
        check_whole(self.name, "iterations", self.iterations, least=1)

    def start(self, width: int, most: int) -> dict[str, Tensor]:
        """Centres from a normal distribution."""
        return {"v": torch.randn(most, width)}

    def reduce(self, tokens: Tokens, seen: Seen | None, cut: Cut) -> tuple[Tokens, Fate | None]:
        """Balance and sum."""
        assert cut.learned is not None
        with unrounded(tokens.x):
            x = F.normalize(tokens.x[:, cut.prefix :].float(), dim=-1)
            centres = _first(cut.learned["v"], cut.leaving - cut.prefix)
            shares = transport(x, centres.float(), self.eps, self.iterations)
            sums = (shares @ x).to(tokens.x.dtype)
        return joined(tokens.x, sums, shares.argmax(dim=1), cut, shares)

    def learned_macs(self, patches: int, left: int, width: int) -> int:
        """Of the similarities and of the sums."""
        return 2 * left * patches * width


def keep_votes(x: Tensor, weights: Weights, mask: Tensor | None = None) -> Tensor:
    """Return DynamicViT's logits [B, P, 2] of keeping and of dropping each token.

    Args:
        x: [B, P, C] patch tokens.
        weights: of the network, by the names of `DynamicViT.start`.
        mask: [B, P, 1] 1 for the tokens that are still there, over which the picture's mean is
            taken; None: all are.
    """
    h = F.gelu(_linear(_normed(x, "in_conv.0", weights), "in_conv.1", weights))
    own, shared = h.chunk(2, dim=2)
    if mask is None:
        mean = shared.mean(dim=1, keepdim=True)
    else:
        # At least one token is there, or none is looked at.
        mean = (shared * mask).sum(dim=1, keepdim=True) / mask.sum(dim=1, keepdim=True).clamp(min=1)
    z = torch.cat([own, mean.expand_as(own)], dim=2)
    for name in ("out_conv.0", "out_conv.2"):
        z = F.gelu(_linear(z, name, weights))
    return _linear(z, "out_conv.4", weights)


def sit_shares(x: Tensor, weights: Weights, count: int) -> Tensor:
    """Return SiT's shares [B, K, P] of each token in each sum; those of a sum add up to 1.

    Args:
        x: [B, P, C] patch tokens.
        weights: of the network, by the names of `SiT.start`.
        count: K.
    """
    h = F.gelu(_linear(_normed(x, "weight.0", weights), "weight.1", weights))
    rows, bias = (_first(weights[f"weight.3.{part}"], count) for part in ("weight", "bias"))
    return (weights["scale"] * F.linear(h, rows, bias)).softmax(dim=1).transpose(1, 2).to(x.dtype)


def query_shares(x: Tensor, queries: Tensor, count: int, scaled: bool = False) -> Tensor:
    """Return PatchMerger's shares [B, K, P] of each token in each sum; those of a sum add up to 1.

    Args:
        x: [B, P, C] patch tokens, normalised.
        queries: [K or more, C].
        count: K.
        scaled: whether scores are divided by the root of C.
    """
    scores = _first(queries, count) @ x.transpose(1, 2)
    return (scores * x.shape[2] ** -0.5 if scaled else scores).softmax(dim=2).to(x.dtype)


def transport(x: Tensor, centres: Tensor, eps: float, iterations: int) -> Tensor:
    """Return the shares [B, K, P] of each token in each centre; those of a token add up to 1.

    Both sides have the same mass a member, so that a centre gets about P / K tokens.

    Args:
        x: [B, P, C] tokens of length 1.
        centres: [K, C] of any length.
        eps: weight of the entropy.
        iterations: how often both sides are balanced.
    """
    similarity = F.normalize(centres, dim=-1) @ x.transpose(1, 2) / eps
    mass = -math.log(sum(similarity.shape[1:]))
    rows = columns = similarity.new_zeros(())
    for _ in range(iterations):
        rows = mass - (similarity + columns).logsumexp(dim=2, keepdim=True)
        columns = mass - (similarity + rows).logsumexp(dim=1, keepdim=True)
    return (similarity + rows + columns - mass).exp()


def _named(layers: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """Return the parameters of layers under their names, with which nothing is computed yet."""
    return {
        f"{name}.{part}": parameter.detach()
        for name, layer in layers.items()
        for part, parameter in layer.named_parameters()
    }


def _normed(x: Tensor, name: str, weights: Weights) -> Tensor:
    weight = weights[f"{name}.weight"]
    return F.layer_norm(x, weight.shape, weight, weights[f"{name}.bias"])


def _linear(x: Tensor, name: str, weights: Weights) -> Tensor:
    return F.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])


def _first(rows: Tensor, count: int) -> Tensor:
    """Return the first rows, one for each token that is left.

    Raises:
        ReductionError: if fewer were learned.
    """
    if len(rows) < count:
        raise ReductionError(
            f"{len(rows)} tokens at most were learned for a block that is to leave {count}: a "
            "learned method runs on the ladder that it was tuned on"
        )
    return rows[:count]
