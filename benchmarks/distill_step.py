"""The step of distillation against the straightforward one, side by side in one run.

    python -m benchmarks.distill_step

Straightforward: for each (source, target) a full forward of the teacher, then a full forward
and backward of the student, everything of the last block included, as Algorithm 1 of the
paper reads. Ours is the trainer's own: students share their source's teacher and the
embedding, and of the last block only what the head reads is computed. Both are given the same
images and rates and no dropout; the largest difference of their gradients is printed, relative
to the largest gradient. Both take turns, and so does who begins; each step runs once for its memory
and then for its time, in images that a student sees a second. Memory is what a step takes at its
peak beyond what was held before it: on a CPU resident memory, which Linux tells.
"""

import argparse
import ctypes
import re
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from adapters import BackboneInfo, BankInfo
from benchmarks import machine
from benchmarks.estimates import in_turn, markdown, ratios, spread
from tocom import Backbone, Variant, forward, load_backbone
from tocom.vit import embed, outputs
from training.config import BackboneConfig, DistillConfig
from training.distill import Plugins, draw_rates
from training.loop_config import LoopConfig
from training.losses import kd_loss
from training.pictures.config import PicturesConfig

Rates = tuple[int, list[int]]


def straightforward(model: torch.nn.Module, plugins: Plugins, images: Tensor, rates: Rates) -> None:
    """Leave the gradients of one draw of rates."""
    source, targets = rates
    for target in targets:
        with torch.no_grad():
            teacher = forward(model, images, source)
        student = forward(model, images, target, plugins(source, target))
        (kd_loss(student, teacher) / len(targets)).backward()


def shared(model: torch.nn.Module, plugins: Plugins, images: Tensor, rates: Rates) -> None:
    """Leave the same gradients by the trainer's step."""
    source, targets = rates
    with torch.no_grad():
        tokens = embed(model, images)
    with torch.inference_mode():
        teacher = outputs(model, tokens, Variant(source)).logits
    teacher = teacher.clone()
    for target in targets:
        student = outputs(model, tokens, Variant(target, plugins(source, target))).logits
        (kd_loss(student, teacher) / len(targets)).backward()


STEPS = {"straightforward": straightforward, "ours": shared}
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def gradients(plugins: Plugins) -> Tensor:
    """Return all gradients in one vector and forget them."""
    grads = [parameter.grad.flatten() for parameter in plugins.parameters()]
    plugins.zero_grad()
    return torch.cat(grads)


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Return the context in which products are in a precision."""
    return torch.autocast(device.type, PRECISIONS[precision], enabled=precision != "fp32")


def timed(step: Callable[[], object], device: torch.device) -> float:
    """Return the seconds that a step takes."""
    began = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def peak_memory(step: Callable[[], object], device: torch.device) -> float:
    """Return the bytes that a step takes at its peak beyond what was held before."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        return torch.cuda.max_memory_allocated(device) - before
    # What earlier steps freed goes back first, or this one would seem to need nothing.
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from now
    before = _status("VmRSS")
    step()
    return _status("VmHWM") - before


def _status(key: str) -> float:
    found = re.search(rf"^{key}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found
    return int(found[1]) * 1024


def new_plugins(backbone: Backbone, device: torch.device) -> Plugins:
    """Return plug-ins that change something: B at zero would hide half of the gradients."""
    info = BankInfo(
        name="benchmark", backbone=BackboneInfo.of(backbone), max_rate=16, rank=2,
        targets=("q", "v"), scale=0.1,
    )  # fmt: skip
    torch.manual_seed(0)
    plugins = Plugins(info).to(device)
    for parameter in plugins.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    return plugins


def recipe(backbone: str, students: int) -> DistillConfig:
    """Return what rates are drawn by: all pairs alike."""
    return DistillConfig(
        name="benchmark", backbone=BackboneConfig(name=backbone), students=students,
        pictures=(PicturesConfig(path="none"),),
        loop=LoopConfig(steps=1, batch_size=1, learning_rate=1e-3),
    )  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backbone", default="bundled:deit_tiny")
    parser.add_argument("--architecture")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--students", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--precision", choices=PRECISIONS, default="fp32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args(argv)

    device = torch.device(arguments.device)
    backbone = load_backbone(arguments.backbone, arguments.architecture)
    model = backbone.model.to(device)
    plugins = new_plugins(backbone, device)
    height, width = model.patch_embed.img_size
    images = torch.randn(arguments.batch, 3, height, width, device=device)

    print(
        f"{machine.describe()}.\n\n{backbone.name}, {device}, {arguments.precision}, batch "
        f"{arguments.batch}, {arguments.rounds} rounds, source and targets random in 0..16\n"
    )
    rows = []
    for students in arguments.students:
        speeds: dict[str, list[float]] = {name: [] for name in STEPS}
        memory: dict[str, list[float]] = {name: [] for name in STEPS}
        worst = 0.0
        for turn in range(-1, arguments.rounds):
            rates = draw_rates(recipe(arguments.backbone, students), turn + 1)
            found = {}
            for name, step in in_turn(STEPS.items(), turn):
                one = partial(step, model, plugins, images, rates)
                with autocast(device, arguments.precision):
                    taken = peak_memory(one, device) / 2**20
                    plugins.zero_grad()
                    seconds = timed(one, device)
                found[name] = gradients(plugins)
                if turn >= 0:  # the first round warms up
                    memory[name].append(taken)
                    speeds[name].append(students * arguments.batch / seconds)
            difference = (found["ours"] - found["straightforward"]).abs().max()
            worst = max(worst, (difference / found["straightforward"].abs().max()).item())
        gain = ratios(speeds["ours"], speeds["straightforward"])
        rows.append(
            [students, *(spread(each, ".1f") for each in speeds.values()), spread(gain),
             *(spread(each, ".0f") for each in memory.values()), f"{worst:.1e}"]
        )  # fmt: skip
    header = ["students a teacher", "straightforward, images/s", "ours, images/s", "ratio",
              "straightforward, MiB", "ours, MiB", "gradients"]  # fmt: skip
    print(markdown(header, rows))


if __name__ == "__main__":
    main()
