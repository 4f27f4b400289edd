"""How much a higher source rate saves in fine-tuning: time and memory of a step, side by side.

    python -m benchmarks.finetune_step

AdaptFormer on noise pictures, batches of 64, in one process for each source, which take turns;
memory is the highest that a process had, on a GPU the highest that it held there.
"""

import argparse
import json
import resource
import subprocess
import sys
from collections.abc import Sequence

import torch

from benchmarks import machine
from benchmarks.distill_step import PRECISIONS, autocast, timed
from benchmarks.estimates import markdown, ratios, spread
from tocom import load_backbone
from tocom.allocator import keep_freed_memory
from training.config import FinetuneConfig
from training.tuning import Finetuning

METHODS = ("adaptformer", "lora", "linear", "full")


def measure(
    backbone: str, method: str, source: int, batch: int, steps: int, device: torch.device,
    precision: str,
) -> dict[str, float]:  # fmt: skip
    """Return the seconds of a step, the first left out, and the MiB of the process or the GPU."""
    keep_freed_memory()
    config = FinetuneConfig.model_validate(
        {
            "name": "step",
            "backbone": {"name": backbone},
            "pictures": {"path": "none"},
            "test": {"path": "none"},
            "method": method,
            "source": source,
            "loop": {"epochs": 1, "batch_size": batch, "learning_rate": 1e-3},
        }
    )
    job = Finetuning(load_backbone(backbone, device=device), config, classes=10)
    optimizer = torch.optim.AdamW(job.module.parameters())
    job.module.train()
    images = torch.randn(batch, 3, *job.model.patch_embed.img_size, device=device)
    labels = torch.randint(10, (batch,), device=device)

    def step() -> None:
        with autocast(device, precision):
            (loss,) = job.losses(images, labels, 0)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    seconds = [timed(step, device) for _ in range(steps + 1)][1:]
    if device.type == "cuda":
        memory = torch.cuda.max_memory_allocated(device) / 2**20
    else:
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"seconds": sum(seconds) / steps, "memory": memory}


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backbone", default="bundled:deit_tiny")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["adaptformer"])
    parser.add_argument("--sources", type=int, nargs="+", default=[0, 8, 16])
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--precision", choices=PRECISIONS, default="fp32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--one", nargs=2, metavar=("METHOD", "SOURCE"), help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.one:
        method, source = options.one[0], int(options.one[1])
        result = measure(
            options.backbone, method, source, options.batch, options.steps,
            torch.device(options.device), options.precision,
        )  # fmt: skip
        print(json.dumps(result))
        return
    print(f"{machine.describe()}.\n\n{options.backbone}, {options.device}, ", end="")
    print(f"{options.precision}, batches of {options.batch}.\n")
    rows = []
    for method in options.methods:
        found: dict[int, list[dict[str, float]]] = {source: [] for source in options.sources}
        for _ in range(options.rounds):
            for source, results in found.items():
                command = [
                    sys.executable, "-m", "benchmarks.finetune_step", "--one", method, str(source),
                    f"--backbone={options.backbone}", f"--batch={options.batch}",
                    f"--steps={options.steps}", f"--device={options.device}",
                    f"--precision={options.precision}",
                ]  # fmt: skip
                results.append(json.loads(subprocess.check_output(command)))
        first = [each["seconds"] for each in found[options.sources[0]]]
        for source, results in found.items():
            seconds = [each["seconds"] for each in results]
            memory = [each["memory"] for each in results]
            rows.append(
                [method, source, spread(seconds), spread(ratios(seconds, first)),
                 spread(memory, ".0f")]
            )  # fmt: skip
    print(markdown(["method", "source", "seconds a step", "of the first", "MiB"], rows))


if __name__ == "__main__":
    main()
