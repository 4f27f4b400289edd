"""All figures of a GPU in ten minutes: forwards, attention, switching, memory, steps and input.

    python -m benchmarks.gpu | tee gpu.md
    python -m benchmarks.gpu --models deit_small_patch16_224 --precision fp32 --pictures train.tar

Nothing is downloaded: weights are drawn, for time does not depend on them. What is measured of each
model, in Markdown: forwards at rates 0 to 16 beside stock timm and plain ToMe, one image (latency)
and many (throughput); what attention costs with the sizes of merged tokens, kernel by kernel; what
it costs to switch rates, and to fold a delta; memory; the step of distillation and of fine-tuning;
and of the last model how many workers feed the step.
"""

import argparse
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from timm.models import save_for_hf
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import distill_step, finetune_step, forward_speed, train_input
from benchmarks.distill_step import PRECISIONS, new_plugins, peak_memory, timed
from benchmarks.estimates import markdown, spread
from tocom import AnyDelta, FoldedWeights, Variant, fold, load_backbone
from tocom.ladder import plan
from tocom.vit import embed, outputs

MODELS = "deit_tiny_patch16_224", "deit_base_patch16_224"
#: Kernels that take a mask, as merged tokens need one.
KERNELS = {
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}
#: Channels that hold the size in place of a mask: kernels want a multiple of eight.
CHANNELS = 8


def milliseconds(run: Callable[[], object], device: torch.device, rounds: int) -> list[float]:
    """Return what a run takes, again and again; the first one is left out."""
    return [1000 * timed(run, device) for _ in range(rounds + 1)][1:]


def with_mask(q: Tensor, k: Tensor, v: Tensor, size: Tensor) -> Tensor:
    """Return proportional attention as `tocom.attention` has it.

    Args:
        q, k, v: [B, H, N, d].
        size: [B, N].
    """
    return F.scaled_dot_product_attention(q, k, v, attn_mask=size.log().to(q)[:, None, None])


def with_channels(q: Tensor, k: Tensor, v: Tensor, size: Tensor) -> Tensor:
    """Return the same without a mask: one more channel adds log(size) to each product."""
    scale = q.shape[-1] ** -0.5
    ones = F.pad(q.new_ones(*q.shape[:3], 1), (0, CHANNELS - 1))
    sizes = (size.log() / scale).to(k)[:, None, :, None].expand(*k.shape[:3], 1)
    q, k = torch.cat([q, ones], -1), torch.cat([k, F.pad(sizes, (0, CHANNELS - 1))], -1)
    y = F.scaled_dot_product_attention(q, k, F.pad(v, (0, CHANNELS)), scale=scale)
    return y[..., :-CHANNELS]


def attention(
    model: VisionTransformer, options: argparse.Namespace, device: torch.device
) -> list[list[object]]:
    """Return a row for the tokens that some blocks have at the highest rate."""
    block = model.blocks[0].attn
    count = model.patch_embed.num_patches + model.num_prefix_tokens
    left = plan(max(options.rates), len(model.blocks), count, model.num_prefix_tokens).tokens
    batch, rows = max(options.batches), []
    for tokens in (count, left[len(left) // 3], left[2 * len(left) // 3]):
        shape = 3, batch, block.num_heads, tokens, block.head_dim
        q, k, v = torch.randn(shape, device=device, dtype=PRECISIONS[options.precision])
        size = torch.randint(1, 5, (batch, tokens), device=device).float()
        ways: dict[str, tuple[AbstractContextManager[None], Callable[[], Tensor]]] = {
            "no sizes": (nullcontext(), partial(F.scaled_dot_product_attention, q, k, v)),
            "torch's choice": (nullcontext(), partial(with_mask, q, k, v, size)),
        }
        for name, kernel in KERNELS.items():
            ways[name] = sdpa_kernel(kernel), partial(with_mask, q, k, v, size)
        ways["in a channel"] = nullcontext(), partial(with_channels, q, k, v, size)
        rows.append(
            [tokens, *(_if_there_is(*way, device, options.rounds) for way in ways.values())]
        )
    return rows


def _if_there_is(
    kernel: AbstractContextManager[None],
    way: Callable[[], Tensor],
    device: torch.device,
    rounds: int,
) -> str:
    try:
        with kernel:
            return spread(milliseconds(way, device, rounds), ".3f")
    except RuntimeError:  # torch has no such kernel here
        return ""


def folds(folder: str, options: argparse.Namespace, device: torch.device) -> list[list[object]]:
    """Return a row for each rate: of one image, and of the weights with a delta folded in.

    Weights differ from rate to rate, as with a bank. Memory is what a forward of many images takes.
    """
    backbone = load_backbone(folder, device=device, dtype=PRECISIONS[options.precision])
    model = backbone.model
    plugins = new_plugins(backbone, torch.device("cpu"))
    image = torch.randn(1, 3, *model.patch_embed.img_size).to(model.head.weight)
    images = image.repeat(max(options.batches), 1, 1, 1)
    folded: dict[int, AnyDelta | None] = {0: None}
    took = {}
    for rate in filter(None, options.rates):
        delta = plugins(0, rate).to(device)
        took[rate] = milliseconds(partial(fold, model, delta), device, options.rounds)
        folded[rate] = fold(model, delta)

    def run(rate: int, images: Tensor) -> object:
        variant = Variant(rate, folded[rate])
        return outputs(model, embed(model, images), variant)

    rows = []
    for rate, others in _each_and_others(options.rates):
        same, other = [], []
        for turn in range(options.rounds):
            for _ in range(2):
                timed(partial(run, rate, image), device)
            same.append(1000 * timed(partial(run, rate, image), device))
            timed(partial(run, others[turn % len(others)], image), device)
            other.append(1000 * timed(partial(run, rate, image), device))
        weights = folded[rate]
        held = weights.nbytes / 2**20 if isinstance(weights, FoldedWeights) else 0
        peak = peak_memory(partial(run, rate, images), device) / 2**20
        rows.append(
            [rate, spread(same), spread(other), spread(took[rate], ".1f") if rate in took else "",
             f"{held:.0f}", f"{peak:.0f}"]
        )  # fmt: skip
    return rows


def _each_and_others(rates: Sequence[int]) -> Iterator[tuple[int, list[int]]]:
    for rate in rates:
        yield rate, [other for other in rates if other != rate]


def tuning(folder: str, options: argparse.Namespace, device: torch.device) -> list[list[object]]:
    """Return a row for each method and source rate of fine-tuning."""
    rows = []
    for method in ("full", "adaptformer"):
        for source in options.rates[::2]:
            found = finetune_step.measure(
                folder, method, source, options.batch, options.rounds, device, options.precision
            )
            speed = options.batch / found["seconds"]
            rows.append([method, source, f"{speed:.0f}", f"{found['memory']:.0f}"])
    return rows


def drawn(name: str, root: Path) -> str:
    """Return the folder of a model with drawn weights."""
    folder = root / name
    save_for_hf(timm.create_model(name), str(folder), safe_serialization=True)
    return str(folder)


def model_figures(name: str, folder: str, options: argparse.Namespace) -> None:
    """Measure one model and print tables."""
    device = torch.device(options.device)
    common = [f"--device={options.device}", f"--precision={options.precision}"]
    print(f"\n## {name}\n\nForwards:\n", flush=True)
    forward_speed.main(
        [*common, "--models", name, "--repeats", str(options.rounds),
         "--rates", *map(str, options.rates), "--batches", *map(str, options.batches)]
    )  # fmt: skip
    with torch.inference_mode():
        model = load_backbone(folder).model
        print(f"Attention of {max(options.batches)} images, ms, by where sizes come in:\n")
        header = ["tokens", "no sizes", "torch's choice", *KERNELS, "in a channel"]
        print(markdown(header, attention(model, options, device)), flush=True)
        print("\nSwitching between rates, each with weights of its own:\n")
        header = ["rate", "one image after the same rate, ms", "after another, ms", "folding, ms",
                  "folded weights, MiB", f"forward of {max(options.batches)}, MiB"]  # fmt: skip
        print(markdown(header, folds(folder, options, device)), flush=True)
    print(f"\nFine-tuning, batches of {options.batch}:\n")
    header = ["method", "source", "images/s", "MiB"]
    print(markdown(header, tuning(folder, options, device)), flush=True)
    print("\nDistillation:\n", flush=True)
    distill_step.main(
        [*common, f"--backbone={folder}", f"--batch={options.batch}",
         f"--rounds={options.rounds}", "--students", "1", "2"]
    )  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print Markdown tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--models", nargs="+", default=MODELS, help="timm's names")
    parser.add_argument("--rates", nargs="+", type=int, default=[0, 4, 8, 12, 16])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 64, 256])
    parser.add_argument("--batch", type=int, default=128, help="of the steps that train")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--pictures", default=str(train_input.SAMPLES), help="to read")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, max(1, cores - 1)])
    parser.add_argument("--device", default="cuda", help="cpu: only whether all of it runs")
    options = parser.parse_args(argv)
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("there is no GPU here; --device cpu tries whether all of it runs")
    if len(set(options.rates)) < 2:
        parser.error("--rates needs two or more: switching is from one to another")
    with tempfile.TemporaryDirectory() as root:
        for name in options.models:
            folder = drawn(name, Path(root))
            model_figures(name, folder, options)
        print("\n## Input\n", flush=True)
        train_input.main(
            [f"--device={options.device}", f"--precision={options.precision}",
             f"--pictures={options.pictures}", f"--backbone={folder}", f"--batch={options.batch}",
             f"--rounds={min(3, options.rounds)}", "--workers", *map(str, options.workers)]
        )  # fmt: skip


if __name__ == "__main__":
    main()
