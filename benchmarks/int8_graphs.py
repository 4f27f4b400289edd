"""Graphs in int8 beside those in fp32: how much faster, and how near their answers are.

    python -m benchmarks.int8_graphs --fit PICTURES --pictures OTHERS
    python -m benchmarks.int8_graphs --rates 0 4 --count 200

For each rung of the bundled model with its bank: both kinds take turns on the same batch, and so
does who begins; a turn is two runs, of which the second counts. KL and agreement are with the fp32
model at rung 0, on pictures that nothing was fitted to.
"""

import argparse
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from adapters import compose, open_bank
from benchmarks import machine
from benchmarks.distill_step import timed
from benchmarks.estimates import in_turn, markdown, ratios, spread
from server.int8.calibration import Calibration
from tocom import Backbone, Variant, fold, load_backbone
from tocom.engines import openvino as engine
from training.pictures.batches import evaluation_batches
from training.pictures.config import PicturesConfig
from training.pictures.sets import open_pictures


def read(path: str, count: int, backbone: Backbone) -> Tensor:
    """Return pictures of a tar file or folder, from all over it, as the model wants them."""
    pictures = PicturesConfig(path=path)
    total = len(open_pictures(pictures).reader)
    keys = [(0, index) for index in range(0, total, max(1, total // count))][:count]
    return torch.cat([images for images, _ in evaluation_batches(backbone, [pictures], keys)])


def logits(graph: engine.Graph, variant: Variant, images: Tensor, size: int) -> Tensor:
    """Return the scores [B, C] of whole batches of images."""
    whole = images[: len(images) // size * size]
    with torch.inference_mode():
        return torch.cat([graph(batch, variant).logits for batch in whole.split(size)])


def apart(found: Tensor, expected: Tensor) -> tuple[float, float]:
    """Return KL to what is expected, and the share of pictures with the same class."""
    p, q = expected.log_softmax(-1), found.log_softmax(-1)
    same = found.argmax(-1) == expected.argmax(-1)
    return (p.exp() * (p - q)).sum(-1).mean().item(), same.float().mean().item()


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--fit", type=Path, help="pictures to fit int8 to; default: the samples")
    parser.add_argument("--pictures", help="a .tar or folder of others; default: noise")
    parser.add_argument("--count", type=int, default=200, help="how many of them")
    parser.add_argument("--rates", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args(argv)

    print(machine.describe(), end="\n\n")
    torch.set_num_threads(1)  # the graphs have their own
    backbone, bank = load_backbone("bundled:deit_tiny"), open_bank("bundled:deit_tiny_bank")
    model, size = backbone.model, options.batch
    fitted = Calibration(options.fit)
    if options.pictures is None:
        torch.manual_seed(0)
        images = torch.randn(4 * size, *backbone.input_size)
    else:
        images = read(options.pictures, options.count, backbone)
    if len(images) < size:
        raise SystemExit(f"a batch is {size} pictures, and there are only {len(images)}")
    rows: list[list[object]] = []
    expected = None
    for rate in sorted({0, *options.rates}):  # rung 0 is what the others are compared with
        scale = bank.multiplier(backbone, 0, rate) if rate else 1.0
        delta = fold(model, compose(bank, 0, rate, scale)) if rate else None
        variant = Variant(rate, delta, None, bank.info.proportional, bank.ladder)
        began = time.process_time()
        ranges = fitted(engine, (model, variant))
        took = time.process_time() - began
        make = partial(engine.Graph, model, variant, size, options.threads)
        graphs = {"fp32": make(), "int8": make(ranges=ranges)}
        seconds: dict[str, list[float]] = {name: [] for name in graphs}
        for turn in range(options.repeats):
            for name, graph in in_turn(graphs.items(), turn):
                run = partial(graph, images[:size], variant)
                run()
                seconds[name].append(timed(run, images.device))
        found = {name: logits(graph, variant, images, size) for name, graph in graphs.items()}
        expected = found["fp32"] if expected is None else expected
        (kl, same), (kl_int8, same_int8) = (apart(each, expected) for each in found.values())
        rows.append(
            [
                rate,
                *(spread([1000 * each for each in times], ".1f") for times in seconds.values()),
                spread(ratios(seconds["fp32"], seconds["int8"])),
                f"{kl:.4f}", f"{kl_int8:.4f}", f"{same:.1%}", f"{same_int8:.1%}", f"{took:.1f}",
            ]
        )  # fmt: skip
    header = (
        "rung", "fp32, ms", "int8, ms", "times as fast", "KL to rung 0: fp32", "int8",
        "same class: fp32", "int8", "to fit, s of a core",
    )  # fmt: skip
    print(markdown(header, rows))


if __name__ == "__main__":
    main()
