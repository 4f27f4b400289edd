"""How much of the multiply-adds that merging saves becomes time: forwards, side by side.

    python -m benchmarks.forward_speed
    python -m benchmarks.forward_speed --models deit_base_patch16_224 --batches 8 --precision bf16
    python -m benchmarks.forward_speed --device cuda --precision bf16 --batches 1 64 256

All kinds of forward take turns on the same noise, in one process: timm's own model, ToMe as its
paper writes it (and its authors' package, where installed), ours run eagerly by torch, and ours
compiled, as the server does it, in pieces of 16 images, 8, 4 and one. On a GPU, in place of that,
timm's and ours recorded once as a CUDA graph and replayed, which launches nothing anew. A turn is
two runs, of which the second counts. A product of large matrices takes its turn too: what it
reaches is the roof. Weights are drawn, not loaded: time does not depend on them.
"""

import argparse
import copy
import itertools
import resource
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from benchmarks import machine
from benchmarks.distill_step import PRECISIONS, timed
from benchmarks.estimates import in_turn, markdown, ratios, spread
from benchmarks.peers.plain_tome import plain_tome
from server.models.graphs import SIZES
from tocom import Variant, cost
from tocom.allocator import keep_freed_memory
from tocom.ladder import plan
from tocom.merging import match, merge
from tocom.vit import embed, outputs

MODELS = "deit_tiny_patch16_224", "deit_small_patch16_224", "deit_base_patch16_224"
Run = Callable[[Tensor], object]


def kinds(model: VisionTransformer, rate: int, images: Tensor) -> dict[str, Run]:
    """Return the ways to run a model at a rate, for so many images as these."""
    found: dict[str, Run] = {"stock": model}
    if rate:
        found["plain ToMe"] = lambda images: plain_tome(model, images, rate)
        if find_spec("tome") is not None:
            found["authors' ToMe"] = _authors(model, rate)
    variant = Variant(rate)
    found["eager"] = lambda images: outputs(model, embed(model, images), variant)
    if images.is_cuda:
        replayed = ("stock", "eager") if rate == 0 else ("eager",)
        for name in replayed:
            with suppress(RuntimeError):  # what waits for the GPU cannot be recorded
                found[f"{name}, replayed"] = _replayed(found[name], images)
    elif _has_graphs(model):
        found["compiled"] = _compiled(model, rate, len(images), torch.get_num_threads())
    return found


def _has_graphs(model: VisionTransformer) -> bool:
    on_cpu = model.head.weight.device.type == "cpu"
    return on_cpu and not model.dynamic_img_size and find_spec("openvino") is not None


def _replayed(run: Run, images: Tensor) -> Run:
    """Return a forward that was recorded as a CUDA graph."""
    own, others = images.clone(), torch.cuda.Stream()
    others.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(others):
        for _ in range(3):  # libraries prepare themselves, which cannot be recorded
            run(own)
    torch.cuda.current_stream().wait_stream(others)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run(own)

    def replay(images: Tensor) -> None:
        own.copy_(images)
        graph.replay()

    return replay


def _authors(model: VisionTransformer, rate: int) -> Run:
    import tome

    patched: Any = copy.deepcopy(model)
    tome.patch.timm(patched, prop_attn=True)
    patched.r = rate
    run: Run = patched
    return run


def _compiled(model: VisionTransformer, rate: int, batch: int, threads: int) -> Run:
    from tocom.engines.openvino import Graph

    dtype = model.head.weight.dtype
    if dtype != torch.float32:  # graphs are made of fp32 and convert it themselves
        model = copy.deepcopy(model).float()
    pieces = [size for size in SIZES if size <= batch]
    variant = Variant(rate)
    graphs = {size: Graph(model, variant, size, threads, dtype) for size in pieces}

    def run(images: Tensor) -> None:
        images = images.float()
        while len(images):
            size = next(size for size in pieces if size <= len(images))
            graphs[size](images[:size], variant)
            images = images[size:]

    return run


def roof(size: int, dtype: torch.dtype, device: torch.device) -> Iterator[float]:
    """Yield the multiply-adds a second of a product of square matrices, again and again."""
    a, b = torch.randn(2, size, size).to(device, dtype)
    a @ b
    while True:
        yield size**3 / timed(lambda: a @ b, device)


def take_turns(
    runs: Mapping[str, Run], images: Tensor, repeats: int, roofs: Iterator[float]
) -> tuple[dict[str, list[float]], float]:
    """Return the seconds of each kind, and the roof in multiply-adds a second."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    reached = []
    for turn in range(repeats):
        for name, run in in_turn(runs.items(), turn):
            one = partial(run, images)
            timed(one, images.device)  # for itself, with caches and threads as it leaves them
            seconds[name].append(timed(one, images.device))
        reached.append(next(roofs))
    return seconds, statistics.median(reached)


def matching_seconds(model: VisionTransformer, rate: int, images: Tensor) -> float:
    """Return what matching and merging of a forward take by themselves, run eagerly."""
    steps = plan(rate, len(model.blocks), model.patch_embed.num_patches + 1, 1)
    total = 0.0
    x = embed(model, images)
    tokens = x.shape[1]
    width = model.embed_dim // model.blocks[0].attn.num_heads
    # The last block merges nothing that its head reads.
    for removed in steps.removed[:-1]:
        x = x[:, :tokens].contiguous()
        size = torch.ones(len(x), tokens, 1, device=x.device)
        total += timed(partial(_merged, x, size, width, removed), x.device)
        tokens -= removed
    return total


def _merged(x: Tensor, size: Tensor, width: int, removed: int) -> object:
    return merge(x, size, match(x[..., :width], removed, 1))


def measure(
    model: VisionTransformer, batch: int, options: argparse.Namespace, roofs: Iterator[float]
) -> list[list[object]]:
    """Return a row for each rate."""
    size = model.patch_embed.img_size
    images = torch.randn(batch, 3, *size).to(model.head.weight)
    rows = []
    for rate in options.rates:
        runs = kinds(model, rate, images)
        seconds, reached = take_turns(runs, images, options.repeats, roofs)
        macs = cost(model, rate, size).macs
        saved = cost(model, 0, size).macs / macs
        share = 0.0
        if rate:
            matching = [matching_seconds(model, rate, images) for _ in range(options.repeats + 1)]
            share = min(matching[1:]) / min(seconds["eager"])
        for name, times in seconds.items():
            if name == "stock" and rate:
                continue
            gains = ratios(seconds["stock"], times)
            against = "plain ToMe" if rate else "stock"
            rows.append(
                [
                    batch, rate, name, spread([1000 * each for each in times], ".1f"),
                    spread(gains), f"{saved:.2f}", f"{statistics.median(gains) / saved:.2f}",
                    spread(ratios(seconds[against], times)),
                    f"{batch * macs / statistics.median(times) / reached:.2f}",
                    f"{share:.0%}" if name == "eager" and rate else "",
                ]
            )  # fmt: skip
    return rows


def draw(tables: Mapping[str, Sequence[Sequence[object]]], batch: int, path: Path) -> None:
    """Draw the speed-up over stock against the ratio of multiply-adds, a panel for each model."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4 * len(tables), 3.6), layout="constrained")
    panels = figure.subplots(1, len(tables), squeeze=False)[0]
    for panel, (name, rows) in zip(panels, tables.items(), strict=True):
        for kind in dict.fromkeys(str(row[2]) for row in rows if row[2] != "stock"):
            points = [row for row in rows if row[2] == kind and row[0] == batch]
            # Of a cell with a spread the median comes first.
            x, y = ([float(str(row[i]).split()[0]) for row in points] for i in (5, 4))
            panel.plot(x, y, marker="o", label=kind)
        panel.axline((1, 1), slope=1, color="grey", linestyle=":", label="all that is saved")
        panel.set_title(f"{name}, {batch} images")
        panel.set_xlabel("times fewer multiply-adds")
    panels[0].set_ylabel("times as fast as stock timm")
    panels[0].legend()
    figure.savefig(path)


def compiling(model: VisionTransformer, rates: Sequence[int]) -> None:
    """Print what graphs cost: seconds and memory."""
    from tocom.engines.openvino import Graph

    images = torch.zeros(SIZES[0], 3, *model.patch_embed.img_size)
    before, seconds, graphs = _resident(), [], []
    for rate in rates:
        variant = Variant(rate)
        began = time.perf_counter()
        graphs.append(Graph(model, variant, SIZES[0], threads=torch.get_num_threads()))
        seconds.append(time.perf_counter() - began)
        graphs[-1](images, variant)
    used = (_resident() - before) / len(graphs)
    print(f"a graph of {SIZES[0]} images: {spread(seconds)} s to compile, {used:.0f} MiB\n")


def _resident() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=MODELS, help="timm's names")
    parser.add_argument("--rates", nargs="+", type=int, default=[0, 4, 8, 12, 16])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 64])
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--plot", type=Path, help="draw those of the middle size of batch")
    options = parser.parse_args(argv)

    keep_freed_memory()
    dtype, device = PRECISIONS[options.precision], torch.device(options.device)
    # On a GPU a larger product, or launching it would take as long.
    roofs = roof(8192 if device.type == "cuda" else 2048, dtype, device)
    print(machine.describe(), end="\n\n")
    tables = {}
    with torch.inference_mode():
        for name in options.models:
            model = timm.create_model(name).eval().to(device, dtype)
            print(f"{name}, {device}, {options.precision}\n", flush=True)
            if options.precision == "fp32" and _has_graphs(model):
                compiling(model, options.rates)
            rows = list(
                itertools.chain(
                    *(measure(model, batch, options, roofs) for batch in options.batches)
                )
            )
            tables[name] = rows
            header = (
                "batch", "rate", "forward", "ms", "over stock", "MAC ratio", "efficiency",
                "over plain ToMe or stock", "of the roof", "matching",
            )  # fmt: skip
            print(markdown(header, rows), end="\n\n", flush=True)
    if options.plot is not None:
        batch = sorted(options.batches)[len(options.batches) // 2]
        draw(tables, batch, options.plot)


if __name__ == "__main__":
    main()
