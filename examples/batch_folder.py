"""Classify a folder of pictures in batches, without a server, and write a table.

    python examples/batch_folder.py photos table.tsv --rate 2
    python examples/batch_folder.py photos table.tsv --budget 0.6

The table is a line a picture, its columns parted by tabs: names of classes have commas. A picture
that cannot be read has no label, and the job goes on.
"""

import argparse
import csv
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from PIL import Image
from timm.data import create_transform
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import tocom
from adapters import compose, open_bank

SUFFIXES = {".jpeg", ".jpg", ".png", ".webp"}


class Pictures(Dataset[tuple[Path, Tensor | None]]):
    """The pictures of a folder as a model wants them: [3, H, W]; None: it cannot be read."""

    def __init__(self, paths: Sequence[Path], backbone: tocom.Backbone) -> None:
        self._paths = paths
        # timm knows the size, the crop and the colours that the model was trained with.
        self._transform = create_transform(**backbone.data_config, is_training=False)

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> tuple[Path, Tensor | None]:
        path = self._paths[index]
        try:
            with Image.open(path) as picture:
                return path, self._transform(picture.convert("RGB"))
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
            return path, None  # to Pillow a damaged PNG is a SyntaxError


def rate_within(backbone: tocom.Backbone, ladder: tocom.Ladder, budget: float, highest: int) -> int:
    """Return the lowest rate that takes at most a share of the stock model's multiply-adds."""
    stock = tocom.cost(backbone.model, 0, ladder=ladder).macs  # in closed form: nothing is run
    for rate in range(highest + 1):
        if tocom.cost(backbone.model, rate, ladder=ladder).macs <= budget * stock:
            return rate
    raise SystemExit(f"no rate up to {highest} fits into the budget {budget:g}")


def classify(
    backbone: tocom.Backbone,
    batches: Iterable[list[tuple[Path, Tensor | None]]],
    rate: int,
    delta: tocom.AnyDelta,
    ladder: tocom.Ladder,
) -> Iterable[tuple[Path, str, str]]:
    """Yield each picture with its label and score; both are empty if it cannot be read."""
    for batch in batches:
        readable = [(path, image) for path, image in batch if image is not None]
        yield from ((path, "", "") for path, image in batch if image is None)
        if not readable:
            continue
        paths, images = zip(*readable, strict=True)
        # The rate and the delta are arguments of the call. The model itself never changes.
        logits = tocom.forward(
            backbone.model,
            torch.stack(images),
            rate,
            delta,
            adapter=backbone.adapter,
            ladder=ladder,
        )
        scores, classes = logits.softmax(dim=-1).max(dim=-1)
        for path, score, index in zip(paths, scores.tolist(), classes.tolist(), strict=True):
            yield path, backbone.class_names[index], f"{score:.4f}"


def main(argv: Sequence[str] | None = None) -> None:
    """Run the job."""
    parser = argparse.ArgumentParser(description="Classify a folder of pictures, in batches.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("table", type=Path)
    parser.add_argument("--backbone", default="bundled:deit_tiny")
    parser.add_argument("--bank", default="bundled:deit_tiny_bank", help="of that backbone")
    how_much = parser.add_mutually_exclusive_group()
    how_much.add_argument("--rate", type=int, default=0, help="0 is the stock model")
    how_much.add_argument("--budget", type=float, help="share of rate 0's multiply-adds")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--workers", type=int, default=0, help="processes that decode pictures")
    asked = parser.parse_args(argv)

    backbone = tocom.load_backbone(asked.backbone)
    bank = open_bank(asked.bank)
    bank.check_fits(backbone)
    rate = asked.rate
    if asked.budget is not None:
        rate = rate_within(backbone, bank.ladder, asked.budget, bank.info.max_rate)
    # The delta repairs what merging costs. All batches have one rate, so it is added to the weights
    # once (W + ΔW, in copies), and a forward with it takes no longer than one without.
    delta = tocom.fold(backbone.model, compose(bank, backbone.source, rate))

    paths = sorted(p for p in asked.folder.rglob("*") if p.suffix.lower() in SUFFIXES)
    batches = DataLoader(
        Pictures(paths, backbone),
        batch_size=asked.batch_size,
        num_workers=asked.workers,
        collate_fn=list,  # unreadable pictures are sorted out before the rest becomes a tensor
    )
    with torch.inference_mode(), asked.table.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file, dialect="excel-tab")
        table.writerow(("picture", "label", "score"))
        for path, label, score in classify(backbone, batches, rate, delta, bank.ladder):
            table.writerow((path.relative_to(asked.folder).as_posix(), label, score))
    print(f"{len(paths)} pictures at rate {rate}: {asked.table}")


if __name__ == "__main__":
    main()
