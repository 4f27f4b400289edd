"""The time of forwards that are compared, eager and compiled."""

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from training.ladders.candidates import Candidate
from training.screen.progress import Progress, following


def time_forwards(
    candidates: Sequence[Candidate],
    rows: Sequence[dict[str, Any]],
    size: int,
    repeats: int,
    threads: int,
) -> None:
    """Put the median milliseconds of a forward of `size` images into the rows.

    All candidates take turns, so that a machine whose speed drifts does so for all. A GPU is waited
    for: a forward returns before it is computed.
    """
    proj = candidates[0].backbone.model.patch_embed.proj
    images = torch.randn(size, *candidates[0].backbone.input_size).to(proj.weight.device)
    runs: dict[tuple[int, str], Callable[[], object]] = {}
    for i, candidate in enumerate(following(candidates, "compiling", "forward")):
        runs[i, "eager"] = partial(candidate, images)
        if (compiled := _compiled(candidate, size, threads)) is not None:
            runs[i, "compiled"] = partial(compiled, images)
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    taken: dict[tuple[int, str], list[float]] = {key: [] for key in runs}
    with torch.inference_mode(), Progress("timing", repeats * len(runs), "run") as bar:
        for _ in range(repeats):
            for key, run in runs.items():
                run()
                _wait(images.device)
                began = time.perf_counter()
                run()
                _wait(images.device)
                taken[key].append(time.perf_counter() - began)
                bar.update()
    torch.set_num_threads(before)
    for (i, how), seconds in taken.items():
        times = rows[i].setdefault("ms", {})
        times[f"{how} x{size}"] = 1000 * statistics.median(seconds)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _compiled(candidate: Candidate, size: int, threads: int) -> Callable[[Tensor], object] | None:
    """Return the compiled forward; None where there is none."""
    try:
        from tocom.engines.openvino import Graph, unsupported
    except ImportError:
        return None
    model, variant = candidate.backbone.model, candidate.variant
    if unsupported(model, variant.ladder.method) or candidate.pixels:
        return None
    graph = Graph(model, variant, size, threads)
    return lambda images: graph(images, variant)
