"""Measuring a segmenter at every rung, with and without a bank.

At each rung: mIoU, pixel accuracy, the share of pixels that have the class which rung 0 gives
them, and the multiply-adds of the encoder. With and without the bank are compared on the same
scenes. What comes out: `evaluation.json` and `.md`.
"""

import json
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load, save
from torch import Tensor

from adapters import Bank, compose, open_bank
from adapters.bank import learned_with
from adapters.durable import replace_file
from adapters.segmentation import Segmenter
from tocom import AnyDelta, Ladder, Variant, cost
from tocom.dense import starts
from training.ladders.chosen import described, measured_attention, measured_ladder, named
from training.measuring import FoldedDeltas, claim, refuse_processes
from training.run_folder import OtherRunError
from training.screen.progress import Progress, say
from training.segment.config import EvaluateSegmentConfig
from training.segment.metrics import counts, error_of_difference, figures, mean_iou
from training.segment.run import load_segmenter, scene_batches
from training.segment.scenes import SceneSet, classes_of


class Forward(NamedTuple):
    """What is measured on every scene."""

    rate: int
    with_bank: bool
    delta: AnyDelta | None


def evaluate_segment(config: EvaluateSegmentConfig, folder: Path) -> Path:
    """Measure a segmenter and return the path of `evaluation.json`.

    A folder that holds a part of it is gone on with; one that holds all is returned at once.

    Raises:
        BackboneError, BankError, ConfigError, DataError, RateError, TaskError: before any compute
            is spent.
    """
    refuse_processes("evaluate-segment")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    say(f"loading {config.backbone.name} and {config.task}, onto {device}")
    segmenter = load_segmenter(
        config.backbone.name, config.backbone.architecture, config.task, device
    )
    backbone, source = segmenter.backbone, segmenter.backbone.source
    bank = open_bank(config.bank) if config.bank else None
    if bank:
        bank.check_fits(backbone, source)
    ladder = measured_ladder(config.ladder, backbone, bank, (source,))
    proportional = measured_attention(None, backbone, bank, (source,))
    labelled = config.scenes.of_task(segmenter.info)
    scenes = SceneSet(labelled, config.test, classes_of(labelled))
    highest = bank.info.max_rate if bank else ladder.top or config.max_rate
    targets = config.targets or tuple(range(highest + 1))
    forwards = _forwards(segmenter, bank, targets, config.multiplier)
    path = folder / "evaluation.json"
    if claim(folder, path.name, config, backbone, bank):
        return path
    learned = learned_with(backbone, bank)
    variants = [
        Variant(each.rate, each.delta, backbone.adapter, proportional, ladder, learned)
        for each in forwards
    ]
    counted, right = _count(segmenter, scenes, config, variants, folder / "progress.safetensors")
    rows = _rows(forwards, counted, right, segmenter)
    whole = encoder_macs(segmenter, scenes, 0, ladder)
    for row in rows:
        macs = encoder_macs(segmenter, scenes, row["target"], ladder)
        row |= {"gmacs": round(macs / 1e9, 4), "share": round(macs / whole, 4)}
    result: dict[str, Any] = {
        "model": backbone.architecture,
        "task_digest": backbone.task_digest,
        "weights_digest": backbone.digest,
        "source": source,
        "bank": {"name": bank.info.name, "digest": bank.info.digest} if bank else None,
        "ladder": described(ladder),
        "pictures": {"name": f"{Path(config.scenes.path).name}, {config.test}"}
        | {"count": counted.shape[1]},
        "rows": rows,
    }
    (folder / "evaluation.md").write_text(table(result), encoding="utf-8")
    # Last: who finds it finds the table.
    replace_file(path, json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    return path


def encoder_macs(segmenter: Segmenter, scenes: SceneSet, rate: int, ladder: Ladder) -> int:
    """Return the encoder's multiply-adds for a picture of the size of the first scene."""
    picture = scenes.read(0).picture
    height, width = segmenter.size(picture.height, picture.width)
    (high, wide), (down, across) = segmenter.info.window, segmenter.info.stride
    high, wide = min(high, height), min(wide, width)
    windows = len(starts(height, high, down)) * len(starts(width, wide, across))
    backbone = segmenter.backbone
    spent = cost(backbone.model, rate, (high, wide), ladder=ladder, adapter=backbone.adapter)
    return windows * (spent.macs - spent.head)


def table(result: dict[str, Any]) -> str:
    """Return the rows as a Markdown table."""
    pictures = result["pictures"]
    lines = [
        f"{result['model']}, {pictures['count']} pictures of {pictures['name']}{named(result)}; "
        "plain / with the bank. Pixels alike are those with the class that rung 0 gives them.",
        "",
        "| rate | GMACs of the encoder | share | mIoU % | pixel accuracy % | pixels alike % | "
        "mIoU, bank against plain |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        cells = [str(row["target"]), f"{row['gmacs']:.3f}", f"{row['share']:.3f}"]
        for key in ("miou", "pixel_accuracy", "agreement"):
            values = [row[kind][key] for kind in ("plain", "bank") if kind in row]
            cells.append(" / ".join(f"{value:.2f}" for value in values))
        bank = row.get("bank")
        cells.append(f"{bank['change']:+.2f} ± {bank['error']:.2f}" if bank else "")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _forwards(
    segmenter: Segmenter, bank: Bank | None, targets: Sequence[int], multiplier: float | None
) -> list[Forward]:
    """Return rung 0, which others are compared with, and each target without and with the bank."""
    source = segmenter.backbone.source
    forwards = [Forward(rate, False, None) for rate in dict.fromkeys((0, *targets))]
    if bank is not None:
        folded = FoldedDeltas(segmenter.backbone, bank)
        scale = multiplier or bank.info.scale
        for target in targets:
            compose(bank, source, target)  # refuses rates that the bank does not have
            if target != source:
                forwards.append(Forward(target, True, folded(source, target, scale)))
    return forwards


@torch.inference_mode()
def _count(
    segmenter: Segmenter,
    scenes: SceneSet,
    config: EvaluateSegmentConfig,
    variants: Sequence[Variant],
    path: Path,
) -> tuple[Tensor, Tensor]:
    """Return [forwards, pictures, K, 2] intersections and unions, and [forwards, pictures, 2].

    The latter are pixels of rung 0's class, and all pixels. What was counted is kept at `path`.

    Raises:
        OtherRunError: if what is kept there is of another number of scenes.
    """
    classes, device = len(segmenter.info.class_names), next(segmenter.decoder.parameters()).device
    count = min(len(scenes), config.limit or len(scenes))
    indices = [i * len(scenes) // count for i in range(count)]
    counted = torch.zeros(len(variants), 0, classes, 2, dtype=torch.int64)
    alike = torch.zeros(len(variants), 0, 2, dtype=torch.int64)
    if path.exists():
        kept = load(path.read_bytes())
        counted, alike = kept["counted"], kept["alike"]
        if (then := int(kept.get("scenes", len(scenes)))) != len(scenes):
            raise OtherRunError(
                f"{path.parent} was begun with {then} scenes of {scenes.path}; there are "
                f"{len(scenes)} now; choose another run folder"
            )
    done = counted.shape[1]
    batches = scene_batches(segmenter, scenes, indices[done:], config.batch_size, config.workers)
    with Progress("measuring", count * len(variants), "forward", done * len(variants)) as bar:
        for number, batch in enumerate(batches, start=1):
            for _, scenes_of_size in groupby(batch, lambda each: (each[0].shape, each[1].shape)):
                pictures, labels = map(torch.stack, zip(*scenes_of_size, strict=True))
                size = (labels.shape[1], labels.shape[2])
                answers = []
                for variant in variants:
                    scores = segmenter.scores(pictures.to(device), variant)
                    answers.append(segmenter.classes(scores, size).cpu())
                    bar.update(len(pictures))
                found = [counts(answer, labels, classes) for answer in answers]
                counted = torch.cat([counted, torch.stack(found)], dim=1)
                same = [(each == answers[0]).flatten(1).sum(dim=1) for each in answers]
                every = [torch.full_like(each, size[0] * size[1]) for each in same]
                pairs = torch.stack([torch.stack(same), torch.stack(every)], dim=2)
                alike = torch.cat([alike, pairs], dim=1)
            if number % config.save_every == 0:
                kept = {"counted": counted, "alike": alike, "scenes": torch.tensor(len(scenes))}
                replace_file(path, save(kept))
    return counted, alike


def _rows(
    forwards: Sequence[Forward], counted: Tensor, alike: Tensor, segmenter: Segmenter
) -> list[dict[str, Any]]:
    """Return a row a rate: its figures plain and with the bank."""
    rows: dict[int, dict[str, Any]] = {}
    plain: dict[int, Tensor] = {}
    for each, pixels, same in zip(forwards, counted, alike.sum(dim=1), strict=True):
        found = figures(pixels.sum(dim=0), segmenter.info.class_names)
        found["agreement"] = round(float(100 * same[0] / same[1]), 2)
        row = rows.setdefault(each.rate, {"target": each.rate})
        if not each.with_bank:
            plain[each.rate] = pixels
            row["plain"] = found
            continue
        before = plain[each.rate]
        found["change"] = round(mean_iou(pixels.sum(dim=0)) - mean_iou(before.sum(dim=0)), 3)
        found["error"] = round(error_of_difference(pixels, before), 3)
        row["bank"] = found
    return list(rows.values())
