"""Which tokens methods keep or join, and what it changes: the measures of a survey, on any ladder.

Candidates are run at their rungs on the same pictures. Pairs of them that differ in one thing, rung
or method or model, are compared by the patches that are still tokens of their own, by the clusters
that patches are joined to, by the features of the class token, and by how far patches come. Each
measure is then correlated with the difference in accuracy; without labels, in agreement with the
model's own rung 0. What comes out: `analysis.json`, `.md`, `.svg`, `.png`, and `depth.svg`, `.png`.
Reference: Which Tokens to Use?, arXiv:2308.04657, section 5.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

from adapters.durable import replace_file
from tocom import Backbone, ConfigError, cost
from training.analysis.config import AnalyseConfig
from training.analysis.drawn import plot_depth, plot_proxies
from training.analysis.observed import Observed, looked_at, observe
from training.analysis.pairs import compared, finite, mean, measured, proxies
from training.analysis.table import table
from training.ladders.candidates import Candidate, Models, candidates_of, contents
from training.measuring import MANY_CLASSES, Measurement, claim, refuse_processes
from training.screen.progress import following

#: A model and its candidates.
Group: TypeAlias = tuple[Backbone, list[Candidate]]


def analyse(config: AnalyseConfig, folder: Path) -> Path:
    """Observe all candidates, compare them and return the path of `analysis.json`.

    Raises:
        BackboneError, BankError, ConfigError, DataError, ReductionError: before any compute is
            spent.
    """
    refuse_processes("analyse")
    groups, blocks, measurements = opened(config)
    backbone = groups[0][0]
    path, made_of = folder / "analysis.json", contents(each for _, mine in groups for each in mine)
    if claim(folder, path.name, config, backbone, None, others=made_of):
        return path
    rows, observed = [], []
    for i, (model, candidates) in enumerate(groups):
        found = observe(measurements[i], candidates, blocks[i])
        name = config.model if i == 0 and config.model else model.name
        rows += [
            _row(name, candidate, each, candidates[0].macs, config.labelled)
            for candidate, each in zip(candidates, found, strict=True)
        ]
        observed += found
    pairs = _compare(rows, observed, config)
    result = {
        "model": config.model or backbone.architecture,
        "weights_digest": backbone.digest,
        "pictures": measurements[0].described,
        "blocks": blocks[0],
        "rows": rows,
        "pairs": pairs,
        "proxies": proxies(pairs),
    }
    (folder / "analysis.md").write_text(table(result), encoding="utf-8")
    plot_proxies(result, folder)
    plot_depth(result, folder)
    # Last: who finds it finds all the others.
    replace_file(path, json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    return path


def opened(config: AnalyseConfig) -> tuple[list[Group], list[list[int]], list[Measurement]]:
    """Open what a recipe names; errors as of `analyse`.

    Returns:
        The models with their candidates, the recipe's model first; of each the blocks that are
        looked at; and the pictures as each sees them.
    """
    groups = _groups(config, Models(config.crop_pct))
    blocks = [looked_at(config.blocks, each.model, each.name) for each, _ in groups]
    if len({len(each) for each in blocks}) > 1:
        raise ConfigError("blocks: models of so few blocks have other quarters; name the blocks")
    return groups, blocks, [_measurement(config, each) for each, _ in groups]


def _groups(config: AnalyseConfig, models: Models) -> list[Group]:
    """Return the candidates of each model, its rung 0 first; the recipe's model leads."""
    backbone = models(config.backbone, config.task)
    groups = {id(backbone): (backbone, [_stock(backbone)])}
    for candidate in candidates_of(
        config.entries, config.backbone, config.task, config.shares, models
    ):
        model = candidate.backbone
        _, mine = groups.setdefault(id(model), (model, [_stock(model)]))
        if candidate.rung:
            mine.append(candidate)
    if not any(candidate.rung for _, mine in groups.values() for candidate in mine):
        raise ConfigError("none of the entries can be made as cheap as one of the shares")
    return list(groups.values())


def _stock(backbone: Backbone) -> Candidate:
    return Candidate("stock", backbone, 0, cost(backbone.model).macs)


def _measurement(config: AnalyseConfig, backbone: Backbone) -> Measurement:
    if backbone.multi_label and config.labelled:
        raise ConfigError(
            f"{backbone.name} {MANY_CLASSES}, which are not ranked here: labelled=false"
        )
    measurement = Measurement(
        backbone, config.pictures, config.batch_size, config.workers, config.labelled, config.limit
    )
    if measurement.count <= backbone.model.embed_dim:
        raise ConfigError(
            f"features of {backbone.model.embed_dim} channels ({backbone.name}) need more pictures "
            f"than that to be compared, got {measurement.count}"
        )
    return measurement


def _row(
    model: str, candidate: Candidate, observed: Observed, whole: int, labelled: bool
) -> dict[str, Any]:
    top1, agreement, kl = observed.figures.mean(dim=0).tolist()
    return {
        "model": model,
        "method": candidate.name,
        "rung": candidate.rung,
        "bank": candidate.bank is not None,
        "seed": candidate.seed,
        "gmacs": candidate.macs / 1e9,
        "share": candidate.macs / whole,
        **({"top1": 100 * top1} if labelled else {}),
        "agreement": 100 * agreement,
        "kl": kl,
        "depth": [[round(value, 4) for value in line] for line in observed.depth.tolist()],
    }


def _compare(
    rows: Sequence[dict[str, Any]], observed: Sequence[Observed], config: AnalyseConfig
) -> list[dict[str, Any]]:
    quality = "top1" if config.labelled else "agreement"
    pairs = []
    chosen = list(compared(rows, config.near))
    for kind, dearer, cheaper in following(chosen, "comparing", "pair"):
        values = measured(observed[dearer], observed[cheaper])
        pairs.append(
            {
                "kind": kind,
                "dearer": dearer,
                "cheaper": cheaper,
                "difference": abs(rows[dearer][quality] - rows[cheaper][quality]),
                "measures": {name: mean(each) for name, each in values.items()},
                "blocks": {
                    name: [finite(value) for value in each]
                    for name, each in values.items()
                    if len(each) > 1
                },
            }
        )
    return pairs
