"""Which candidates are compared, by which measures, and what the measures say of accuracy."""

from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from training.analysis.correlation import kendall, pearson, spearman
from training.analysis.features import canonical, centred, cka, procrustes
from training.analysis.maps import earth_movers, js, kl, similarity
from training.analysis.observed import Observed
from training.analysis.tokens import agreement, kept, overlap

#: What pairs differ in. `stock`: one of them is rung 0 of the model.
KINDS = ("stock", "rungs", "methods", "models")
#: In words.
MEASURES = {
    "iou": "kept sets: IoU",
    "ioa": "kept sets: IoA",
    "homogeneity": "clusters: homogeneity",
    "completeness": "clusters: completeness",
    "nmi": "clusters: NMI",
    "procrustes": "features: Procrustes distance",
    "cka": "features: CKA distance",
    "mean_cca": "features: mean CCA",
    "mean_sq_cca": "features: mean squared CCA",
    "pwcca": "features: PWCCA distance",
    "depth_kl": "depth maps: KL",
    "depth_js": "depth maps: JS",
    "depth_pearson": "depth maps: Pearson",
    "depth_spearman": "depth maps: Spearman",
    "depth_sim": "depth maps: SIM",
    "depth_emd": "depth maps: EMD",
}


def kind_of(first: dict[str, Any], second: dict[str, Any], near: float) -> str | None:
    """Return what two candidates differ in if it is one thing only; None: they are not compared.

    Args:
        first, second: their rows: model, method, rung, share and whether there is a bank.
        near: how far the shares of equal cost may differ.
    """
    same_model = first["model"] == second["model"]
    if 0 in (first["rung"], second["rung"]):
        return "stock" if same_model and first["rung"] != second["rung"] else None
    same_method = all(first[key] == second[key] for key in ("method", "bank"))
    same_cost = abs(first["share"] - second["share"]) <= near
    if same_model and same_method:
        return "rungs" if first["rung"] != second["rung"] else None  # seeds differ in nothing else
    if not same_cost:
        return None
    if same_model:
        return "methods"
    return "models" if same_method else None


def compared(rows: Sequence[dict[str, Any]], near: float) -> Iterator[tuple[str, int, int]]:
    """Yield (kind, dearer, cheaper) for every pair that is compared."""
    for i, j in combinations(range(len(rows)), 2):
        if (kind := kind_of(rows[i], rows[j], near)) is not None:
            cheaper_first = rows[i]["share"] < rows[j]["share"]
            yield (kind, j, i) if cheaper_first else (kind, i, j)


def measured(dearer: Observed, cheaper: Observed) -> dict[str, list[float]]:
    """Return each measure that two candidates can have: after each block, or once of a map.

    Kept sets and clusters need the same grid; clusters also that both join patches.
    """
    found: dict[str, list[float]] = {}
    alike = dearer.depth.shape == cheaper.depth.shape
    for a, b in zip(dearer.held, cheaper.held, strict=True) if alike else ():
        _add(found, _of_tokens(a, b))
    for a, b in zip(dearer.features, cheaper.features, strict=True):
        _add(found, _of_features(centred(a), centred(b)))
    if alike:
        _add(found, _of_maps(dearer.depth, cheaper.depth))
    return found


def proxies(pairs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return of each measure its mean and its correlation with the difference in accuracy."""
    found = []
    for kind in KINDS:
        for measure in MEASURES:
            values = [
                (pair["difference"], value)
                for pair in pairs
                if pair["kind"] == kind and (value := pair["measures"].get(measure)) is not None
            ]
            if not values:
                continue
            differences, each = (
                torch.tensor(column).double() for column in zip(*values, strict=True)
            )
            found.append(
                {
                    "kind": kind,
                    "measure": measure,
                    "pairs": len(values),
                    "mean": float(each.mean()),
                    "spearman": finite(spearman(differences, each)),
                    "kendall": finite(kendall(differences, each)),
                }
            )
    return found


def finite(value: float) -> float | None:
    """Return a number that JSON has; None: it is none."""
    return value if -float("inf") < value < float("inf") else None


def mean(values: Sequence[float]) -> float | None:
    """Return the mean of the values that are numbers; None: there is none."""
    numbers = [value for value in values if finite(value) is not None]
    return sum(numbers) / len(numbers) if numbers else None


def _add(found: dict[str, list[float]], values: dict[str, float]) -> None:
    for name, value in values.items():
        found.setdefault(name, []).append(value)


def _of_tokens(dearer: Tensor, cheaper: Tensor) -> dict[str, float]:
    own = kept(dearer), kept(cheaper)
    alike = overlap(*own)
    values = {"iou": _over(alike.iou), "ioa": _over(alike.ioa)}
    joined = all(
        bool(((held >= 0) & ~alone).any())
        for held, alone in zip((dearer, cheaper), own, strict=True)
    )
    nan = float("nan")
    if not joined:
        return values | {"homogeneity": nan, "completeness": nan, "nmi": nan}
    clusters = agreement(cheaper, dearer)
    return values | {name: _over(each) for name, each in clusters._asdict().items()}


def _of_features(a: Tensor, b: Tensor) -> dict[str, float]:
    cca = canonical(a, b)
    return {
        "procrustes": procrustes(a, b),
        "cka": cka(a, b),
        "mean_cca": cca.mean,
        "mean_sq_cca": cca.mean_squared,
        "pwcca": cca.distance,
    }


def _of_maps(a: Tensor, b: Tensor) -> dict[str, float]:
    return {
        "depth_kl": kl(a, b),
        "depth_js": js(a, b),
        "depth_pearson": pearson(a.flatten(), b.flatten()),
        "depth_spearman": spearman(a.flatten(), b.flatten()),
        "depth_sim": similarity(a, b),
        "depth_emd": earth_movers(a, b),
    }


def _over(pictures: Tensor) -> float:
    """Return the mean over the pictures that have a value."""
    return float(pictures.nanmean())
