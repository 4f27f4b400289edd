"""Methods and ladders side by side on one model: what each loses at how many multiply-adds.

Of each: KL divergence from the stock model, agreement with it and top-1 on the same pictures, the
time of a forward, eager and compiled, and whether anything else is both cheaper and closer. The
rival that everybody has is among them: the stock model on smaller pictures. What comes out:
`compare.json`, `.md`, `.svg` and `.png`.
"""

import copy
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from adapters.durable import replace_file
from adapters.ladder import read_ladder
from tocom import Backbone, ConfigError, Ladder, Variant, cost
from tocom.reduction import method_of
from tocom.vit import embed, outputs
from training.ladders.chosen import usual_ladder
from training.ladders.compare_config import CompareConfig, EntryConfig
from training.measuring import Measurement, claim, compare, load_model, refuse_processes
from training.pictures.batches import evaluation_batches
from training.plot import plot_compare
from training.screen.progress import Progress, following


@dataclass(frozen=True)
class Candidate:
    """One way to be cheaper.

    Attributes:
        name: of its method, ladder or rival.
        rung: of its ladder; of smaller pictures, their height in pixels.
        macs: multiply-adds of an image.
        model: that runs.
        variant: how it runs.
        pixels: height of the pictures that it sees; None: as they come.
    """

    name: str
    rung: int
    macs: int
    model: VisionTransformer
    variant: Variant
    pixels: int | None = None

    def __call__(self, images: Tensor) -> Tensor:
        """Return the logits [B, classes] of images [B, 3, H, W]."""
        if self.pixels is not None:
            size = (self.pixels, self.pixels)
            images = F.interpolate(images, size, mode="bicubic", antialias=True)
        return outputs(self.model, embed(self.model, images), self.variant).logits


def compare_methods(config: CompareConfig, folder: Path) -> Path:
    """Measure all candidates and return the path of `compare.json`.

    Raises:
        BackboneError, ConfigError, DataError, ReductionError: before any compute is spent.
    """
    refuse_processes("compare")
    backbone = load_model(config.backbone, config.task, config.crop_pct)
    candidates = list(_candidates(config, backbone))
    path = folder / "compare.json"
    if claim(folder, path.name, config, backbone, None):
        return path
    measurement = Measurement(
        backbone, config.pictures, config.batch_size, config.workers, config.labelled, config.limit
    )
    rows = _measure(measurement, candidates)
    for size in config.time_batches:
        _time(candidates, rows, size, config.repeats, config.threads)
    _mark(rows)
    result = {
        "model": config.model or backbone.architecture,
        "weights_digest": backbone.digest,
        "pictures": measurement.described,
        "rows": rows,
    }
    (folder / "compare.md").write_text(table(result), encoding="utf-8")
    plot_compare(result, folder)
    # Last: who finds it finds all the others.
    replace_file(path, json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    return path


def _candidates(config: CompareConfig, backbone: Backbone) -> Iterator[Candidate]:
    model, adapter = backbone.model, backbone.adapter
    stock = Candidate("stock", 0, cost(model).macs, model, Variant(0, None, adapter))
    yield stock
    for entry in config.entries:
        ladder = _ladder(entry, config, model)
        ladder.check(model)
        ladder.check_learned(model, backbone.learned)
        for rung in range(1, (ladder.top or 0) + 1):
            variant = Variant(rung, None, adapter, backbone.proportional, ladder, backbone.learned)
            yield Candidate(
                ladder.name, rung, cost(model, rung, ladder=ladder).macs, model, variant
            )
    for pixels in config.pixels:
        if pixels % model.patch_embed.patch_size[0]:
            raise ConfigError(
                f"pixels: {pixels} is no multiple of the patches' {model.patch_embed.patch_size[0]}"
            )
        smaller = copy.deepcopy(model)
        smaller.set_input_size(img_size=(pixels, pixels))
        macs = cost(smaller).macs
        yield Candidate(
            "smaller pictures", pixels, macs, smaller, Variant(0, None, adapter), pixels
        )


def _ladder(entry: EntryConfig, config: CompareConfig, model: VisionTransformer) -> Ladder:
    if entry.ladder is not None:
        return read_ladder(entry.ladder).ladder()
    assert entry.method is not None
    method = method_of(entry.method, entry.options)
    return usual_ladder(method, model, config.shares, entry.name or entry.method)


@torch.inference_mode()
def _measure(measurement: Measurement, candidates: Sequence[Candidate]) -> list[dict[str, Any]]:
    """Return a row for each candidate: figures on all pictures."""
    device = measurement.backbone.model.patch_embed.proj.weight.device
    sums: list[Any] = [0.0] * len(candidates)
    batches = evaluation_batches(
        measurement.backbone, [measurement.pictures], measurement.keys, measurement.batch_size,
        measurement.workers,
    )  # fmt: skip
    whole = sum(candidate.macs for candidate in candidates)
    with Progress("measuring", measurement.count * whole, "MAC") as bar:
        for images, folders in batches:
            images = images.to(device)
            classes = None
            if measurement.classes is not None:
                classes = measurement.classes[folders].to(device)
            stock = candidates[0](images)
            for i, candidate in enumerate(candidates):
                answer = candidate(images) if i else stock
                sums[i] = sums[i] + compare(answer, stock, classes).sum(dim=0).cpu()
                bar.update(len(images) * candidate.macs)
    rows = []
    for candidate, total in zip(candidates, sums, strict=True):
        top1, agreement, kl = (total / measurement.count).tolist()
        row = {
            "name": candidate.name,
            "rung": candidate.rung,
            "gmacs": candidate.macs / 1e9,
            "share": candidate.macs / candidates[0].macs,
            "agreement": 100 * agreement,
            "kl": kl,
        }
        rows.append(row | ({"top1": 100 * top1} if measurement.labelled else {}))
    return rows


def _time(
    candidates: Sequence[Candidate],
    rows: Sequence[dict[str, Any]],
    size: int,
    repeats: int,
    threads: int,
) -> None:
    """Put the median milliseconds of a forward of `size` images into the rows.

    All candidates take turns, so that a machine whose speed drifts does so for all.
    """
    side = candidates[0].model.patch_embed.img_size
    images = torch.randn(size, candidates[0].model.patch_embed.proj.in_channels, *side)
    images = images.to(candidates[0].model.patch_embed.proj.weight.device)
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
                began = time.perf_counter()
                run()
                taken[key].append(time.perf_counter() - began)
                bar.update()
    torch.set_num_threads(before)
    for (i, how), seconds in taken.items():
        times = rows[i].setdefault("ms", {})
        times[f"{how} x{size}"] = 1000 * statistics.median(seconds)


def _compiled(candidate: Candidate, size: int, threads: int) -> Callable[[Tensor], object] | None:
    """Return the compiled forward; None where there is none."""
    try:
        from tocom.engines.openvino import Graph, unsupported
    except ImportError:
        return None
    if unsupported(candidate.model, candidate.variant.ladder.method) or candidate.pixels:
        return None
    graph = Graph(candidate.model, candidate.variant, size, threads)
    return lambda images: graph(images, candidate.variant)


def _mark(rows: Sequence[dict[str, Any]]) -> None:
    """Say of each row whether no other is as cheap and as close to the stock model."""
    for row in rows:
        row["best"] = not any(
            other["gmacs"] <= row["gmacs"] and other["kl"] < row["kl"]
            for other in rows
            if other is not row
        )


def table(result: dict[str, Any]) -> str:
    """Return all rows as Markdown."""
    rows = result["rows"]
    labelled = "top1" in rows[0]
    timed = sorted({how for row in rows for how in row.get("ms", {})})
    header = ["method", "rung", "GMACs", "share", *(["top-1, %"] if labelled else [])]
    header += ["agreement, %", "KL", *(f"{how}, ms" for how in timed)]
    lines = [
        f"{result['model']}, {result['pictures']['count']} pictures of "
        f"{result['pictures']['name']}, no plug-ins. In bold: nothing else is as cheap and as "
        "close to the stock model.",
        "",
        "| " + " | ".join(header) + " |",
        "|" + "---|" * len(header),
    ]
    for row in rows:
        kl = f"{row['kl']:.4f}"
        cells = [row["name"], str(row["rung"]), f"{row['gmacs']:.3f}", f"{row['share']:.3f}"]
        cells += [f"{row['top1']:.1f}"] if labelled else []
        cells += [f"{row['agreement']:.1f}", f"**{kl}**" if row["best"] else kl]
        cells += [f"{row['ms'][how]:.1f}" if how in row.get("ms", {}) else "" for how in timed]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, ""])
