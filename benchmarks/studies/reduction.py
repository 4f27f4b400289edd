"""Which way of reducing tokens changes a model's answers least, without training.

Each method removes 8 or 16 tokens in every block. KL divergence in nats and agreement of the most
probable class are to the stock model's answers, so pictures need no labels; ± is the standard error
of the difference to the first row, picture by picture.
"""

import argparse
import random
import statistics
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.estimates import markdown
from tocom import Backbone, Ladder, Variant, cost, load_backbone
from tocom.reduction import MCTF, DiffRate, Method, ToMe, options_of
from tocom.vit import embed, outputs
from training.measuring import compare
from training.pictures.batches import evaluation_batches
from training.pictures.config import PicturesConfig
from training.pictures.sets import open_pictures

STUDIED: list[Method] = [
    ToMe(),
    ToMe(importance=0.05),
    ToMe(importance=0.05, size=0.05),
    ToMe(importance=0.05, metric="tokens"),
    ToMe(importance=0.05, weight="class"),
    ToMe(importance=0.05, metric="tokens", weight="class"),
    MCTF(),
    DiffRate(pruned=0),
    DiffRate(pruned=0.5),
    DiffRate(pruned=1),
]
RATES = (8, 16)

#: What was measured of a method at a rate, picture by picture: KL and agreement.
Found = dict[tuple[Method, int], list[tuple[float, float]]]


def measure(
    backbone: Backbone, path: str, count: int, seed: int, methods: Sequence[Method]
) -> Found:
    """Compare methods with rung 0 on some pictures, drawn at random."""
    pictures = PicturesConfig(path=path)
    chosen = list(range(len(open_pictures(pictures).reader)))
    random.Random(seed).shuffle(chosen)
    model, found = backbone.model, Found()
    keys = [(0, index) for index in chosen[:count]]
    for images, _ in evaluation_batches(backbone, [pictures], keys):
        x = embed(model, images)
        stock = outputs(model, x, Variant()).logits
        for method in methods:
            for rate in RATES:
                variant = Variant(rate, ladder=Ladder(method.name, method))
                compared = compare(outputs(model, x, variant).logits, stock, None)
                rows = [(kl, agreed) for _, agreed, kl in compared.tolist()]
                found.setdefault((method, rate), []).extend(rows)
    return found


def table(backbone: Backbone, found: Found) -> str:
    """Return what was found, one line a method."""
    header, rows = ["method"], list[list[str]]()
    for rate in RATES:
        header += [f"r = {rate}: GMACs", "KL", "agreement"]
    methods = list(dict.fromkeys(method for method, _ in found))
    for method in methods:
        cells = [_named(method)]
        for rate in RATES:
            macs = cost(backbone.model, rate, ladder=Ladder(method.name, method)).macs
            kls, agreed = zip(*found[method, rate], strict=True)
            first, _ = zip(*found[methods[0], rate], strict=True)
            cells += [f"{macs / 1e9:.3f}", _with_error(kls, first)]
            cells.append(f"{100 * statistics.mean(agreed):.1f} %")
        rows.append(cells)
    return markdown(header, rows)


def _with_error(values: Sequence[float], base: Sequence[float]) -> str:
    mean = f"{statistics.mean(values):.4f}"
    if values == base or len(values) < 2:
        return mean
    gaps = [value - other for value, other in zip(values, base, strict=True)]
    return f"{mean} ± {statistics.stdev(gaps) / len(gaps) ** 0.5:.4f}"


def _named(method: Method) -> str:
    usual = options_of(type(method)())
    said = [f"{k} {v}" for k, v in options_of(method).items() if v != usual[k]]
    return ", ".join([method.name, *said])


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print a table for each set of pictures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", required=True, help="what load_backbone loads")
    parser.add_argument("--architecture", help="timm's name, for a .safetensors file")
    parser.add_argument("--pictures", required=True, nargs="+", metavar="TAR")
    parser.add_argument("--count", type=int, default=250, help="pictures of each set")
    parser.add_argument("--seed", type=int, default=0, help="which pictures are drawn")
    arguments = parser.parse_args(argv)
    backbone = load_backbone(arguments.weights, arguments.architecture)
    with torch.inference_mode():
        for path in arguments.pictures:
            found = measure(backbone, path, arguments.count, arguments.seed, STUDIED)
            pictures = len(next(iter(found.values())))
            print(f"{Path(path).name}, {pictures} pictures, seed {arguments.seed}:\n")
            print(table(backbone, found), flush=True)
            print()


if __name__ == "__main__":
    main()
