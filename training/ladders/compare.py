"""Methods, ladders and banks side by side: what each loses at how many multiply-adds.

Of each: KL divergence from the stock model, agreement with it and top-1 on the same pictures, the
weights, the time of a forward, eager and compiled, and whether anything else is both cheaper and
closer. For each budget of multiply-adds the best is named, and compared with the others picture by
picture. The rival that everybody has is among them: the stock model on smaller pictures. What comes
out: `compare.json`, `.md`, `.svg` and `.png`.
"""

import copy
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adapters.durable import replace_file
from tocom import ConfigError, cost
from training.ladders.budgets import budgets
from training.ladders.candidates import Candidate, Models, candidates_of, contents
from training.ladders.compare_config import CompareConfig
from training.ladders.compare_table import table
from training.ladders.timing import time_forwards
from training.measuring import MANY_CLASSES, MEASURES, Measurement, claim, refuse_processes
from training.pictures.batches import evaluation_batches
from training.plot import plot_compare
from training.screen.progress import Progress

Key = tuple[str, int, bool]


def compare_methods(config: CompareConfig, folder: Path) -> Path:
    """Measure all candidates and return the path of `compare.json`.

    Raises:
        BackboneError, BankError, ConfigError, DataError, ReductionError: before any compute is
            spent.
    """
    refuse_processes("compare")
    candidates, measurements = opened(config)
    backbone = candidates[0].backbone
    path = folder / "compare.json"
    if claim(folder, path.name, config, backbone, None, others=contents(candidates)):
        return path
    figures = _measure(measurements, candidates)
    groups: dict[Key, list[int]] = {}
    for i, candidate in enumerate(candidates):
        groups.setdefault(candidate.key, []).append(i)
    first = [candidates[places[0]] for places in groups.values()]
    seeds = [figures[places] for places in groups.values()]  # [S, P, 3] each
    rows = [
        _row(candidate, each, candidates[0].macs, config.labelled)
        for candidate, each in zip(first, seeds, strict=True)
    ]
    for size in config.time_batches:
        time_forwards(first, rows, size, config.repeats, config.threads)
    _mark(rows)
    measures = MEASURES if config.labelled else MEASURES[1:]
    pictures = torch.stack([each.mean(dim=0) for each in seeds])
    result = {
        "model": config.model or backbone.architecture,
        "weights_digest": backbone.digest,
        "banks": _banks(candidates),
        "pictures": measurements[id(backbone)].described,
        "judge": config.judge,
        "rows": rows,
        "budgets": budgets(rows, pictures, config.shares, config.judge, measures),
    }
    (folder / "compare.md").write_text(table(result), encoding="utf-8")
    plot_compare(result, folder)
    # Last: who finds it finds all the others.
    replace_file(path, json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    return path


def opened(config: CompareConfig) -> tuple[list[Candidate], dict[int, Measurement]]:
    """Open what a recipe names; errors as of `compare_methods`.

    Returns:
        The candidates, the stock model first, and the pictures as each model sees them, by the
        model's identity.
    """
    candidates = list(_candidates(config, Models(config.crop_pct)))
    return candidates, _measurements(config, candidates)


def _candidates(config: CompareConfig, models: Models) -> Iterator[Candidate]:
    backbone = models(config.backbone, config.task)
    model = backbone.model
    stock = Candidate("stock", backbone, 0, cost(model).macs)
    yield stock
    yield from candidates_of(config.entries, config.backbone, config.task, config.shares, models)
    for pixels in config.pixels:
        if pixels % model.patch_embed.patch_size[0]:
            raise ConfigError(
                f"pixels: {pixels} is no multiple of the patches' {model.patch_embed.patch_size[0]}"
            )
        smaller = copy.deepcopy(model)
        smaller.set_input_size(img_size=(pixels, pixels))
        # What is decoded is what the stock model sees; the candidate makes it smaller.
        own = replace(backbone, model=smaller)
        yield Candidate("smaller pictures", own, pixels, cost(smaller).macs, pixels=pixels)


def _banks(candidates: Sequence[Candidate]) -> dict[str, list[str]]:
    """Return the digests of the banks of each entry, one a seed."""
    found: dict[str, list[str]] = {}
    for candidate in candidates:
        if candidate.bank is not None:
            digests = found.setdefault(candidate.name, [])
            if len(digests) <= candidate.seed:
                digests.append(candidate.bank.info.digest)
    return found


def _measurements(config: CompareConfig, candidates: Sequence[Candidate]) -> dict[int, Measurement]:
    """Return the pictures as each model sees them, by the model's identity.

    Raises:
        ConfigError: if a model has other classes than the first.
    """
    measurements: dict[int, Measurement] = {}
    stock = candidates[0].backbone
    if stock.multi_label and config.labelled:
        raise ConfigError(f"{stock.name} {MANY_CLASSES}, which are not ranked here: labelled=false")
    for candidate in candidates:
        model = candidate.backbone
        if model.class_names != stock.class_names:
            raise ConfigError(
                f"{candidate.name!r} answers {len(model.class_names)} classes "
                f"({model.class_names[0]!r}, ...), {stock.name} "
                f"{len(stock.class_names)} ({stock.class_names[0]!r}, ...): they must be the same"
            )
        if candidate.pixels is None and id(model) not in measurements:
            measurements[id(model)] = Measurement(
                model, config.pictures, config.batch_size, config.workers, config.labelled,
                config.limit,
            )  # fmt: skip
    return measurements


@torch.inference_mode()
def _measure(measurements: dict[int, Measurement], candidates: Sequence[Candidate]) -> Tensor:
    """Return top-1, agreement and KL to the stock model of each picture [candidates, P, 3]."""
    stock = candidates[0].backbone
    count = measurements[id(stock)].count
    figures = torch.zeros(len(candidates), count, len(MEASURES), dtype=torch.float64)
    reference = torch.zeros(count, len(stock.class_names))
    with Progress("measuring", count * sum(each.macs for each in candidates), "MAC") as bar:
        for owner, measurement in measurements.items():
            here = [
                (i, each)
                for i, each in enumerate(candidates)
                if id(stock if each.pixels else each.backbone) == owner
            ]
            device = next(measurement.backbone.model.parameters()).device
            batches = evaluation_batches(
                measurement.backbone, [measurement.pictures], measurement.keys,
                measurement.batch_size, measurement.workers,
            )  # fmt: skip
            done = 0
            for images, folders in batches:
                images, seen = images.to(device), slice(done, done + len(images))
                classes = None if measurement.classes is None else measurement.truth(folders)
                for i, candidate in here:
                    answer = candidate(images).float().cpu()
                    if i == 0:
                        reference[seen] = answer
                    figures[i, seen] = measurement.compare(answer, reference[seen], classes)
                    bar.update(len(images) * candidate.macs)
                done += len(images)
    return figures


def _row(candidate: Candidate, seeds: Tensor, whole: int, labelled: bool) -> dict[str, Any]:
    """Return the row of a candidate.

    Args:
        candidate: of the first seed.
        seeds: figures of each picture [S, P, 3].
        whole: multiply-adds of the stock model.
        labelled: whether there is top-1.
    """
    scale = torch.tensor([100.0, 100.0, 1.0], dtype=torch.float64)
    of_seeds = seeds.mean(dim=1) * scale  # [S, 3]
    top1, agreement, kl = of_seeds.mean(dim=0).tolist()
    row: dict[str, Any] = {
        "name": candidate.name,
        "rung": candidate.rung,
        "bank": candidate.bank is not None,
        "gmacs": candidate.macs / 1e9,
        "share": candidate.macs / whole,
        "parameters": candidate.parameters,
        **({"top1": top1} if labelled else {}),
        "agreement": agreement,
        "kl": kl,
    }
    if (count := seeds.shape[1]) > 1:
        row["kl_se"] = float(seeds[..., 2].mean(dim=0).std()) / count**0.5
    if len(seeds) > 1:
        deviations = zip(MEASURES, of_seeds.std(dim=0).tolist(), strict=True)
        row["seeds"] = {"count": len(seeds)} | {
            name: spread for name, spread in deviations if name in row
        }
    return row


def _mark(rows: Sequence[dict[str, Any]]) -> None:
    """Say of each row whether no other is as cheap and as close to the stock model."""
    for row in rows:
        row["best"] = not any(
            other["gmacs"] <= row["gmacs"] and other["kl"] < row["kl"]
            for other in rows
            if other is not row
        )
