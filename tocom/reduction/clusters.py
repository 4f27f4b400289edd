"""Clusters of patch tokens: each is replaced by its medoid or by its mean.

Works on any tokens [B, N, C] in its functions; the classes keep the prefix tokens out of it.
Distances are Euclidean and in fp32. How close decisions were is not measured.

Letters: B images, N tokens in, K clusters.
Reference: Which Tokens to Use?, arXiv:2308.04657, section 3; DPC-KNN as in Token Clustering
Transformer, arXiv:2204.08680, section 3.2.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from tocom.merging import unrounded
from tocom.reduction.options import check_flag, check_one_of, check_whole
from tocom.reduction.protocol import Cut, Fate, Heads, Method, Place, Seen, Tokens, Unit
from tocom.reduction.ranking import highest

UPDATES = ("textbook", "reference")


@dataclass(frozen=True)
class KMedoids(Method):
    """Keep the medoids of K clusters; the tokens that received most attention are the first.

    Acts on the input of a block and reads the attention of the block before.

    Attributes:
        iterations: how often tokens are assigned and medoids updated.
        update: which token of a cluster is its medoid, see `k_medoids`.
    """

    name: ClassVar = "kmedoids"
    place: ClassVar = Place.INPUT
    unit: ClassVar = Unit.KEPT
    looks_back: ClassVar = True

    iterations: int = 3
    update: str = "textbook"

    def __post_init__(self) -> None:
        """Raise ReductionError if an option has a value that it cannot have."""
        check_whole(self.name, "iterations", self.iterations, least=0)
        check_one_of(self.name, "update", self.update, UPDATES)

    def reduce(self, tokens: Tokens, seen: Seen | None, cut: Cut) -> tuple[Tokens, Fate | None]:
        """Cluster the patch tokens and keep the medoids."""
        assert seen is not None
        x, prefix = tokens.x, cut.prefix
        weight = seen.received[:, prefix:]
        start = highest(weight, cut.leaving - prefix)
        distance = _between_patches(x, prefix)
        medoids, cluster = k_medoids(distance, weight, start, self.iterations, self.update)
        kept = x[:, prefix:].gather(1, medoids.unsqueeze(-1).expand(-1, -1, x.shape[2]))
        return joined(x, kept, cluster, cut)

    def macs(self, tokens: int, leaving: int, width: int, heads: Heads) -> int:
        """Of the attention that is received and of the distances."""
        return tokens**2 * (heads.channels + width)


@dataclass(frozen=True)
class DPCKNN(Method):
    """Replace clusters around peaks of density by their means; acts on the input of a block.

    All tokens weigh the same in a mean, also those that are means already, unless weights are
    learned.

    Attributes:
        neighbours: how many tokens, itself included, tell how dense it is around a token.
        weighted: whether a token weighs in the mean as a linear layer, which is learned, says.
    """

    name: ClassVar = "dpcknn"
    place: ClassVar = Place.INPUT
    unit: ClassVar = Unit.KEPT

    neighbours: int = 5
    weighted: bool = False

    def __post_init__(self) -> None:
        """Raise ReductionError if an option has a value that it cannot have."""
        check_whole(self.name, "neighbours", self.neighbours, least=1)
        check_flag(self.name, "weighted", self.weighted)

    @property
    def learns(self) -> bool:  # type: ignore[override]
        """Whether weights of tokens are learned."""
        return self.weighted

    def start(self, width: int, most: int) -> dict[str, Tensor]:
        """A linear layer, the logarithm of a token's weight; at zero, all weigh the same."""
        if not self.weighted:
            return {}
        return {"score.weight": torch.zeros(1, width), "score.bias": torch.zeros(1)}

    def reduce(self, tokens: Tokens, seen: Seen | None, cut: Cut) -> tuple[Tokens, Fate | None]:
        """Cluster the patch tokens and keep the means."""
        x, prefix = tokens.x, cut.prefix
        clusters = cut.leaving - prefix
        # Per channel, so that a density means the same at any width.
        distance = _between_patches(x, prefix) * x.shape[2] ** -0.5
        cluster = nearest(distance, density_peaks(distance, clusters, self.neighbours))
        patches, weight = x[:, prefix:], None
        if self.weighted:
            assert cut.learned is not None
            weight = token_weights(patches, cut.learned)
        return joined(x, cluster_means(patches, cluster, clusters, weight), cluster, cut)

    def learned_macs(self, patches: int, left: int, width: int) -> int:
        """Of the linear layer."""
        return patches * width if self.weighted else 0

    def macs(self, tokens: int, leaving: int, width: int, heads: Heads) -> int:
        """Of the distances."""
        return tokens**2 * width


def distances(x: Tensor) -> Tensor:
    """Return the distances [B, N, N], in fp32, of tokens x [B, N, C]; 0 of each to itself."""
    with unrounded(x):
        x = x.detach().float()
        # As if from their mean: what tokens have in common would cost digits.
        x = x - x.mean(dim=1, keepdim=True)
        product = x @ x.transpose(1, 2)
    length = x.square().sum(dim=2)
    squared = length.unsqueeze(1) + length.unsqueeze(2) - 2 * product
    itself = torch.eye(x.shape[1], dtype=torch.bool, device=x.device)
    return squared.clamp(min=0).sqrt().masked_fill(itself, 0)


def nearest(distance: Tensor, centres: Tensor) -> Tensor:
    """Return the cluster [B, N] of each token: that of the nearest centre, of a centre its own.

    Args:
        distance: [B, N, N] from token to token.
        centres: [B, K] tokens, each once.
    """
    batch, clusters = centres.shape
    columns = centres.unsqueeze(1).expand(-1, distance.shape[1], -1)
    cluster = distance.gather(2, columns).argmin(dim=2)
    own = torch.arange(clusters, device=centres.device).expand(batch, clusters)
    return cluster.scatter(1, centres, own)


def k_medoids(
    distance: Tensor, weight: Tensor, start: Tensor, iterations: int, update: str = "textbook"
) -> tuple[Tensor, Tensor]:
    """Return the medoids [B, K] and the cluster [B, N] of each token.

    Args:
        distance: [B, N, N] from token to token.
        weight: [B, N] how much each token counts.
        start: [B, K] the first medoids, each token once.
        iterations: how often tokens are assigned and medoids updated.
        update: `"textbook"`: the medoid is the token of a cluster of least weighted distance to
            the tokens of the cluster; `"reference"`: that of least distance to all tokens of the
            image, times its own weight, as the paper's code has it.
    """
    medoids, cluster = start, nearest(distance, start)
    clusters = torch.arange(start.shape[1], device=start.device).unsqueeze(1)
    for _ in range(iterations):
        if update == "textbook":
            apart = cluster.unsqueeze(1) != cluster.unsqueeze(2)
            badness = (distance * weight.unsqueeze(1)).masked_fill(apart, 0).sum(dim=2)
        else:
            badness = distance.sum(dim=2) * weight
        outside = cluster.unsqueeze(1) != clusters  # [B, K, N]
        medoids = badness.unsqueeze(1).masked_fill(outside, torch.inf).argmin(dim=2)
        cluster = nearest(distance, medoids)
    return medoids, cluster


def density_peaks(
    distance: Tensor, count: int, neighbours: int = 5, noise: Tensor | None = None
) -> Tensor:
    """Return the tokens [B, K] that are dense and far from all that are denser, the best first.

    Args:
        distance: [B, N, N] from token to token.
        count: K.
        neighbours: how many of the nearest tokens, itself included, tell how dense it is around
            a token: exp(-mean of their squared distances).
        noise: [B, N] in [0, 1), of which 1e-6 times is added to the densities; None: none.
    """
    near = distance.topk(min(neighbours, distance.shape[2]), dim=2, largest=False).values
    # In logarithms, in which no density is too small to be told from 0.
    density = -near.square().mean(dim=2)
    if noise is not None:
        density = (density.exp() + 1e-6 * noise).log()
    denser = density.unsqueeze(1) > density.unsqueeze(2)  # [B, N, N] the second than the first
    apart = distance.masked_fill(~denser, torch.inf).amin(dim=2)
    # The densest has none to be far from.
    apart = apart.minimum(distance.amax(dim=(1, 2)).unsqueeze(1))
    return highest(density + apart.log(), count)


def cluster_means(x: Tensor, cluster: Tensor, count: int, weight: Tensor | None = None) -> Tensor:
    """Return the weighted mean [B, K, C] of each cluster, in the dtype of x.

    Args:
        x: [B, N, C] tokens.
        cluster: [B, N] of each token; none is empty.
        count: K.
        weight: [B, N, 1] above 0; None: all weigh the same.
    """
    batch, _, width = x.shape
    image = torch.arange(batch, device=x.device).unsqueeze(1)
    # Whole rows, which a CPU adds up faster than scatter_add does.
    into = (cluster + count * image).flatten()
    weights = torch.ones_like(x[..., :1], dtype=torch.float32) if weight is None else weight.float()
    total = weights.new_zeros(batch * count, 1).index_add(0, into, weights.flatten(0, 1))
    share = weights.flatten(0, 1) / total.index_select(0, into)
    rows = x.flatten(0, 1) * share
    means = rows.new_zeros(batch * count, width).index_add(0, into, rows)
    return means.to(x.dtype).view(batch, count, width)


def _between_patches(x: Tensor, prefix: int) -> Tensor:
    """Return the distances of the tokens behind the prefix.

    Of all tokens, and cut after that: a few rows are no more work than a copy of the others.
    """
    return distances(x)[:, prefix:, prefix:]


def token_weights(x: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
    """Return how much each token weighs in a mean: [B, N, 1], above 0, in fp32.

    Args:
        x: [B, N, C] tokens.
        weights: of a linear layer, `score.weight` [1, C] and `score.bias` [1].
    """
    return F.linear(x, weights["score.weight"], weights["score.bias"]).float().exp()


def joined(
    x: Tensor, kept: Tensor, cluster: Tensor, cut: Cut, shares: Tensor | None = None
) -> tuple[Tokens, Fate | None]:
    """Return the prefix tokens of x with what is kept of its clusters, and where all went.

    Args:
        x: [B, N, C] tokens, prefix tokens first.
        kept: [B, K, C] one token a cluster.
        cluster: [B, P] of each patch token.
        cut: how many prefix tokens there are, and whether to trace.
        shares: [B, K, P] of each patch token in what is kept, of soft clusters.
    """
    prefix = cut.prefix
    tokens = Tokens(torch.cat([x[:, :prefix], kept], dim=1))
    if not cut.trace:
        return tokens, None
    front = torch.arange(prefix, device=x.device).expand(x.shape[0], prefix)
    fate = Fate(torch.cat([front, prefix + cluster], dim=1))
    if shares is None:
        return tokens, fate
    own = torch.eye(prefix, device=x.device, dtype=shares.dtype).expand(x.shape[0], -1, -1)
    patches = F.pad(shares.transpose(1, 2), (prefix, 0))
    weight = torch.cat([F.pad(own, (0, kept.shape[1])), patches], dim=1)
    # Which sum holds a token is a decision, too: the one that has most of it.
    most = shares.float().topk(min(2, shares.shape[1]), dim=1).values
    margin = (most[:, 0] - most[:, 1]).amin(dim=1) if shares.shape[1] > 1 else None
    return tokens, fate._replace(weight=weight, margin=margin)
