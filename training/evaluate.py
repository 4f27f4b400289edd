"""Measuring a model at every rate, with and without a bank.

For a model tuned at `source` and run at `target`: top-1 accuracy; agreement with, and KL
divergence from, the same model at its source rate. KL is the sharp measure: it moves long
before a label flips. What comes out: `evaluation.json`, `evaluation.md`, `evaluation.svg`
and `.png`.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from adapters import Bank, compose, open_bank
from tocom import AnyDelta, Backbone, DataError, cost, fold, forward, load_backbone
from training.config import EvaluateConfig
from training.data import evaluation_batches, open_pictures
from training.plot import plot_evaluation


def evaluate(config: EvaluateConfig, folder: Path) -> Path:
    """Measure what the recipe asks for and return the path of `evaluation.json`.

    Raises:
        BackboneError, BankError, DataError, RateError: before any compute is spent.
    """
    backbone = load_backbone(config.backbone.name, config.backbone.architecture)
    bank = open_bank(config.bank) if config.bank else None
    if bank:
        bank.check_fits(backbone)
    highest = bank.info.max_rate if bank else config.max_rate
    targets = config.targets or tuple(range(highest + 1))
    classes = class_indices(config.pictures.path, backbone)
    batches = evaluation_batches(backbone, [config.pictures], batch_size=config.batch_size)
    rows = measure(backbone, bank, config.sources, targets, batches, classes)
    result: dict[str, Any] = {
        "model": config.model or backbone.architecture,
        "bank": {"name": bank.info.name, "digest": bank.info.digest} if bank else None,
        "pictures": {"name": Path(config.pictures.path).name, "count": rows[0]["pictures"]},
        "rows": rows,
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "evaluation.json"
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    (folder / "evaluation.md").write_text(table(result), encoding="utf-8")
    plot_evaluation(result, folder)
    return path


@torch.inference_mode()
def measure(
    backbone: Backbone,
    bank: Bank | None,
    sources: Sequence[int],
    targets: Sequence[int],
    batches: Any,
    classes: Sequence[int],
) -> list[dict[str, Any]]:
    """Return a row for each (source, target).

    Args:
        backbone: the model.
        bank: measured as well, if there is one.
        sources, targets: rates.
        batches: (images [B, 3, H, W], folder numbers [B]).
        classes: the model's class of each folder number.

    Returns:
        Rows of source, target, gmacs, tokens, pictures and, under `plain` and `bank`, `top1` and
        `agreement` in percent and `kl` in nats.
    """
    device = next(backbone.model.parameters()).device
    deltas: dict[tuple[int, int], AnyDelta] = {
        (source, target): fold(backbone.model, compose(bank, source, target))
        for source in sources
        for target in targets
        if bank and source != target
    }
    sums: dict[tuple[int, int, str], Tensor] = {}
    pictures = 0
    lookup = torch.tensor(classes)
    for images, folders in tqdm(batches, unit="batch", dynamic_ncols=True):
        images, labels = images.to(device), lookup[folders].to(device)
        pictures += len(images)
        plain = {
            rate: forward(backbone.model, images, rate) for rate in sorted({*sources, *targets})
        }
        for source in sources:
            for target in targets:
                logits = {"plain": plain[target]}
                if (delta := deltas.get((source, target))) is not None:
                    logits["bank"] = forward(backbone.model, images, target, delta)
                for what, answer in logits.items():
                    key = (source, target, what)
                    sums[key] = sums.get(key, 0) + _compare(answer, plain[source], labels)
    rows = []
    for source in sources:
        for target in targets:
            spent = cost(backbone.model, target)
            row: dict[str, Any] = {
                "source": source,
                "target": target,
                "gmacs": round(spent.macs / 1e9, 4),
                "tokens": spent.plan.tokens[-1],
                "pictures": pictures,
            }
            for what in ("plain", "bank"):
                if (key := (source, target, what)) in sums:
                    top1, agreement, kl = (sums[key] / pictures).tolist()
                    row[what] = {
                        "top1": round(100 * top1, 2),
                        "agreement": round(100 * agreement, 2),
                        "kl": round(kl, 5),
                    }
            rows.append(row)
    return rows


def class_indices(path: str, backbone: Backbone) -> list[int]:
    """Return the model's class of each folder of a set of pictures.

    Folders are named by class number or by class name; where neither fits, as many folders as
    classes are taken in their order.

    Raises:
        DataError: if the folders cannot be the model's classes.
    """
    reader = open_pictures(path).reader
    numbers: dict[str, int] = getattr(reader, "class_name_to_idx", None) or reader.class_to_idx
    names = sorted(numbers, key=lambda name: numbers[name])
    known = {name: i for i, name in enumerate(backbone.class_names)}
    if all(name in known for name in names):
        return [known[name] for name in names]
    if all(name.isdigit() and int(name) < len(known) for name in names):
        return [int(name) for name in names]
    if len(names) == len(known):
        return list(range(len(names)))
    raise DataError(
        f"{path} has {len(names)} folders ({names[0]!r}, ...) that are neither numbers nor names "
        f"of the {len(known)} classes of {backbone.name}"
    )


def table(result: dict[str, Any], targets: Sequence[int] = ()) -> str:
    """Return the rows, or those of the first source at `targets`, as a Markdown table."""
    first = result["rows"][0]["source"]
    rows = [
        row
        for row in result["rows"]
        if not targets or (row["source"] == first and row["target"] in targets)
    ]
    pictures = result["pictures"]
    lines = [
        f"{result['model']}, {pictures['count']} pictures of {pictures['name']}; plain merging / "
        "with the bank. Agreement and KL are to the model at its source rate.",
        "",
        "| source | rate | GMACs | tokens left | top-1 % | agreement % | KL (nats) |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        plain, bank = row["plain"], row.get("bank")
        figures = [
            f"{plain[key]:{form}}" + (f" / {bank[key]:{form}}" if bank else "")
            for key, form in (("top1", ".1f"), ("agreement", ".1f"), ("kl", ".4f"))
        ]
        cells = [row["source"], row["target"], f"{row['gmacs']:.3f}", row["tokens"], *figures]
        lines.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _compare(logits: Tensor, reference: Tensor, labels: Tensor) -> Tensor:
    """Return the sums [3] of hits, of agreements and of KL(reference ‖ logits)."""
    answer, expected = logits.float().log_softmax(dim=-1), reference.float().log_softmax(dim=-1)
    kl = (expected.exp() * (expected - answer)).sum(dim=-1)
    top, agreed = logits.argmax(dim=-1), reference.argmax(dim=-1)
    return torch.stack([(top == labels).sum(), (top == agreed).sum(), kl.sum()]).cpu().double()
