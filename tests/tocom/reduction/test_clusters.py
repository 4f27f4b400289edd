"""K-Medoids and DPC-KNN: the golden cases, slow references in plain loops, properties."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests import oracle_case
from tocom import Ladder, ReductionError
from tocom.reduction import DPCKNN, Cut, KMedoids, Seen, Tokens
from tocom.reduction.clusters import (
    cluster_means,
    density_peaks,
    distances,
    joined,
    k_medoids,
    nearest,
)
from tocom.reduction.ranking import highest

TOLERANCE = {"rtol": 0, "atol": 1e-4}


# --- the golden cases


@pytest.mark.parametrize("update", ["textbook", "reference"])
@pytest.mark.parametrize("name", ["kmedoids_1", "kmedoids_2", "kmedoids_3"])
def test_k_medoids_agree_with_the_golden_cases(name, update):
    case, tensors = oracle_case.read(f"reduction/{name}")
    x, start = tensors["x"], tensors["init"]
    weight = torch.ones(x.shape[:2])
    if case["weighted"]:  # without weights the reference starts from a random token
        weight = tensors["token_weight"].squeeze(-1)
        assert torch.equal(highest(weight, case["K"]), start)
    medoids, cluster = k_medoids(distances(x), weight, start, case["iters"], update)
    suffix = "ref" if update == "reference" else update
    assert torch.equal(medoids, tensors[f"medoids_{suffix}"])
    assert torch.equal(cluster, tensors[f"assign_{suffix}"])
    if update == "reference":
        kept = torch.stack([tokens[ids] for tokens, ids in zip(x, medoids, strict=True)])
        torch.testing.assert_close(kept, tensors["x_out_ref"], **TOLERANCE)


@pytest.mark.parametrize("name", ["dpcknn_1", "dpcknn_2", "dpcknn_3"])
def test_dpc_knn_agrees_with_the_golden_cases(name):
    case, tensors = oracle_case.read(f"reduction/{name}")
    x = tensors["x"]
    distance = distances(x) / math.sqrt(x.shape[2])
    centres = density_peaks(distance, case["K"], case["k"], tensors["noise"])
    cluster = nearest(distance, centres)
    assert torch.equal(centres, tensors["centers"])
    assert torch.equal(cluster, tensors["assign"])
    weight = None
    if case["learned_weight"]:
        weight = (x @ tensors["w.score.weight"].T + tensors["w.score.bias"]).exp()
    means = cluster_means(x, cluster, case["K"], weight)
    torch.testing.assert_close(means, tensors["x_out"], **TOLERANCE)


# --- slow references; whole numbers are exact in fp32, so that ties are ties on both sides


@st.composite
def spaces(draw):
    """Distances [B, N, N] in whole numbers, with ties, and how many clusters."""
    count = draw(st.integers(2, 14))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    half = torch.randint(0, 7, (draw(st.integers(1, 2)), count, count), generator=generator).triu(1)
    weight = torch.randint(1, 6, half.shape[:2], generator=generator)
    clusters = draw(st.integers(1, count - 1))
    return (half + half.transpose(1, 2)).float(), weight.float(), clusters


def slow_nearest(distance, centres):
    cluster = []
    for i in range(len(distance)):
        best = min(range(len(centres)), key=lambda k: distance[i][centres[k]])
        cluster.append(centres.index(i) if i in centres else best)
    return cluster


def slow_k_medoids(distance, weight, medoids, iterations, update):
    tokens = range(len(distance))
    for _ in range(iterations):
        cluster = slow_nearest(distance, medoids)
        before, medoids = medoids, []
        for k in range(len(before)):
            members = [i for i in tokens if cluster[i] == k]
            if update == "textbook":
                badness = [sum(weight[j] * distance[i][j] for j in members) for i in members]
            else:
                badness = [weight[i] * sum(distance[i]) for i in members]
            medoids.append(members[badness.index(min(badness))])
    return medoids, slow_nearest(distance, medoids)


def slow_density_peaks(distance, count, neighbours):
    tokens = range(len(distance))
    near = [sorted(row)[:neighbours] for row in distance]
    density = [math.exp(-sum(d * d for d in row) / len(row)) for row in near]
    farthest = max(max(row) for row in distance)
    score = []
    for i in tokens:
        apart = [distance[i][j] for j in tokens if density[j] > density[i]]
        score.append(density[i] * min(apart, default=farthest))
    return sorted(tokens, key=lambda i: score[i], reverse=True)[:count]  # stable


@given(spaces(), st.integers(0, 3), st.sampled_from(["textbook", "reference"]))
def test_k_medoids_equal_plain_loops(drawn, iterations, update):
    distance, weight, clusters = drawn
    start = highest(weight, clusters)
    medoids, cluster = k_medoids(distance, weight, start, iterations, update)
    for i in range(distance.shape[0]):
        order = sorted(range(distance.shape[1]), key=lambda j: -weight[i, j].item())
        assert start[i].tolist() == order[:clusters]
        rows, weights = distance[i].tolist(), weight[i].tolist()
        slow = slow_k_medoids(rows, weights, order[:clusters], iterations, update)
        assert (medoids[i].tolist(), cluster[i].tolist()) == slow


@given(spaces(), st.integers(1, 6))
def test_density_peaks_equal_plain_loops(drawn, neighbours):
    distance, _, clusters = drawn
    centres = density_peaks(distance.double(), clusters, neighbours)
    for i in range(distance.shape[0]):
        slow = slow_density_peaks(distance[i].tolist(), clusters, neighbours)
        assert centres[i].tolist() == slow


@given(spaces())
def test_no_cluster_is_empty_and_means_equal_plain_loops(drawn):
    distance, weight, clusters = drawn
    batch, count, _ = distance.shape
    cluster = nearest(distance, highest(weight, clusters))
    x = torch.randn(batch, count, 3, generator=torch.Generator().manual_seed(0))
    for weights in (None, weight.unsqueeze(-1)):
        means = cluster_means(x, cluster, clusters, weights)
        for i in range(batch):
            assert set(cluster[i].tolist()) == set(range(clusters))
            for k in range(clusters):
                members = [j for j in range(count) if cluster[i, j] == k]
                shares = [1.0 if weights is None else weight[i, j].item() for j in members]
                total = sum(share * x[i, j] for share, j in zip(shares, members, strict=True))
                torch.testing.assert_close(means[i, k], total / sum(shares))


# --- distances


@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_distances_are_exact_also_far_from_the_origin(offset):
    x = torch.randn(2, 30, 8, generator=torch.Generator().manual_seed(0)) + offset
    distance = distances(x)
    expected = torch.cdist(x.double(), x.double()).float()
    torch.testing.assert_close(distance, expected, rtol=0, atol=1e-4)
    assert torch.equal(distance.diagonal(dim1=1, dim2=2), torch.zeros(2, 30))


def test_distances_are_in_fp32_under_autocast():
    x = torch.randn(1, 20, 8, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        under = distances(x)
    assert torch.equal(under, distances(x))
    assert distances(x.bfloat16()).dtype == torch.float32


# --- the methods


def drawn(prefix, batch=2, patches=12, width=8, heads=2):
    """Tokens and what attention saw of them."""
    generator = torch.Generator().manual_seed(prefix)
    count = prefix + patches
    x = torch.randn(batch, count, width, generator=generator)
    q, k, v = torch.randn(3, batch, heads, count, width // heads, generator=generator)
    return Tokens(x), Seen(q, k, v, None, 0.5)


@pytest.mark.parametrize("prefix", [0, 1, 2, 5])
@pytest.mark.parametrize("update", ["textbook", "reference"])
def test_k_medoids_keep_the_prefix_and_tokens_as_they_are(prefix, update):
    tokens, seen = drawn(prefix)
    cut = Cut(1, prefix, prefix + 4, (3, 4), trace=True)
    left, fate = KMedoids(update=update).reduce(tokens, seen, cut)
    attention = torch.einsum("bhid,bhjd->bhij", seen.q * seen.scale, seen.k).softmax(dim=-1)
    weight = attention.sum(dim=(1, 2))[:, prefix:]
    patches = tokens.x[:, prefix:]
    for i in range(2):
        distance = torch.cdist(patches[i].double(), patches[i].double()).tolist()
        order = weight[i].argsort(descending=True)[:4].tolist()
        medoids, cluster = slow_k_medoids(distance, weight[i].tolist(), order, 3, update)
        assert torch.equal(left.x[i, :prefix], tokens.x[i, :prefix])
        assert torch.equal(left.x[i, prefix:], patches[i, medoids])
        into = [*range(prefix), *(prefix + k for k in cluster)]
        assert fate.into[i].tolist() == into


@pytest.mark.parametrize("prefix", [0, 1, 2, 5])
def test_dpc_knn_keeps_the_prefix_and_replaces_clusters_by_means(prefix):
    tokens, _ = drawn(prefix)
    cut = Cut(0, prefix, prefix + 4, (3, 4), trace=True)
    left, fate = DPCKNN(neighbours=3).reduce(tokens, None, cut)
    patches = tokens.x[:, prefix:]
    for i in range(2):
        distance = (torch.cdist(patches[i].double(), patches[i].double()) / 8**0.5).tolist()
        cluster = slow_nearest(distance, slow_density_peaks(distance, 4, 3))
        assert fate.into[i].tolist() == [*range(prefix), *(prefix + k for k in cluster)]
        assert torch.equal(left.x[i, :prefix], tokens.x[i, :prefix])
        for k in range(prefix, prefix + 4):
            torch.testing.assert_close(left.x[i, k], tokens.x[i, fate.into[i] == k].mean(dim=0))


@pytest.mark.parametrize("method", [KMedoids(), DPCKNN()])
def test_nothing_is_traced_unless_asked_for(method):
    tokens, seen = drawn(1)
    assert method.reduce(tokens, seen, Cut(1, 1, 5, (3, 4)))[1] is None


def test_how_nearly_another_sum_held_a_token_is_traced():
    shares = torch.tensor([[[0.6, 0.45], [0.4, 0.35], [0.0, 0.2]]])
    x, cut = torch.zeros(1, 3, 4), Cut(1, 1, 4, (1, 2), trace=True)
    _, fate = joined(x, torch.zeros(1, 3, 4), shares.argmax(dim=1), cut, shares)
    torch.testing.assert_close(fate.margin, torch.tensor([0.1]))
    only = shares.sum(dim=1, keepdim=True)
    _, fate = joined(x, torch.zeros(1, 1, 4), only.argmax(dim=1), cut, only)
    assert fate.margin is None


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: KMedoids(update="mean"), "one of textbook, reference, got 'mean'"),
        (lambda: KMedoids(iterations=-1), "'kmedoids' must be a whole number of 0"),
        (lambda: KMedoids(iterations=True), "0 or more, got True"),
        (lambda: DPCKNN(neighbours=0), "'dpcknn' must be a whole number of 1 or"),
        (lambda: DPCKNN(neighbours=2.5), "got 2.5"),
    ],
)
def test_options_that_there_are_not_are_refused(build, message):
    with pytest.raises(ReductionError, match=message):
        build()


def test_k_medoids_leave_the_first_block_alone():
    with pytest.raises(ReductionError, match="rung 1 of the ladder 'k' must have 0 for the first"):
        Ladder("k", KMedoids(), ((0, 0), (8, 4)), patches=16)
    assert Ladder("k", KMedoids(), ((0, 0), (0, 4)), patches=16).top == 1
    assert Ladder("d", DPCKNN(), ((0, 0), (8, 4)), patches=16).top == 1
