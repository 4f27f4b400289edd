"""What the commands of `tocom-train` do; each imports what it needs.

Each prints the path of what it made to stdout, for programs, and what people look at to stderr: a
table or a summary, and what to type next.
"""

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

from training.analysis.config import AnalyseConfig
from training.cascade.config import CascadeConfig
from training.config import BackboneConfig, DistillConfig, ElasticConfig, FinetuneConfig
from training.ladders.compare_config import CompareConfig
from training.ladders.search_config import LadderSearchConfig
from training.measuring_config import CalibrateConfig, EvaluateConfig
from training.prune.config import PruneConfig
from training.screen.progress import say
from training.segment.config import EvaluateSegmentConfig, SegmentConfig
from training.vtab.config import VtabConfig


def _search(config: LadderSearchConfig, folder: Path) -> None:
    from training.ladders.search import search

    path = search(config, folder)
    _tell_table(path.parent / "search.md")
    rungs = f"ladder={_word(path)} max_rate={len(config.shares)} beyond=0"
    _tell_next(f"tocom-train distill RECIPE {_of(config.backbone)} pictures=PICTURES {rungs}")
    print(path)


def _distill(config: DistillConfig, folder: Path) -> None:
    from training.distill import distill

    bank = distill(config, folder)
    _tell_summary(folder)
    _tell_next(
        f"tocom-bank publish {_word(bank)}",
        _serve(config.name, config.backbone, bank=bank),
        f"tocom-train evaluate every-rate {_of(config.backbone)} bank={_word(bank)} "
        "pictures=OTHER_PICTURES",
    )
    print(bank)


def _elastic(config: ElasticConfig, folder: Path) -> None:
    from training.elastic import elastic

    model = elastic(config, folder)
    _tell_summary(folder)
    tuned = BackboneConfig(name=str(model))
    _tell_next(
        _serve(config.name, tuned),
        f"tocom-train evaluate every-rate {_of(tuned)} pictures=OTHER_PICTURES",
    )
    print(model)


def _finetune(config: FinetuneConfig, folder: Path) -> None:
    from training.finetune import finetune

    made = finetune(config, folder)
    _tell_summary(folder)
    full = config.method == "full"
    described = made / ("config.json" if full else "task.json")
    said = json.loads(described.read_text(encoding="utf-8"))["training"]
    if config.many:
        say(f"on the test pictures mAP is {100 * said['test_map']:.2f} %, at its source rate")
    else:
        right = 100 * said["test_accuracy"]
        say(f"of the test pictures {right:.2f} % are answered rightly, at its source rate")
    tuned = BackboneConfig(name=str(made)) if full else config.backbone
    task = None if full else made
    given = "" if full else f" task={_word(made)}"
    _tell_next(
        _serve(config.name, tuned, task=task, bank="BANK"),
        f"tocom-train evaluate every-rate {_of(tuned)}{given} bank=BANK pictures=TEST_PICTURES",
    )
    print(made)


def _prune(config: PruneConfig, folder: Path) -> None:
    from training.prune.prune import prune

    model = prune(config, folder)
    _tell_summary(folder)
    said = json.loads((model / "config.json").read_text(encoding="utf-8"))["training"]
    for when in ("before", "after"):
        top1 = f", {100 * said[when]['top1']:.2f} % right" if "top1" in said[when] else ""
        say(
            f"{when:<6}  {said[when]['macs'] / 1e9:.4f} GMACs, "
            f"{said[when]['parameters'] / 1e6:.2f} M parameters{top1}"
        )
    pruned = BackboneConfig(name=str(model))
    task = model.with_name("task")
    parts = {"task": task} if task.exists() else {}
    given = f" task={_word(task)}" if parts else ""
    _tell_next(
        _serve(config.name, pruned, **parts),
        f"tocom-train evaluate every-rate {_of(pruned)}{given} pictures=TEST_PICTURES",
        f"tocom-train distill RECIPE {_of(pruned)} pictures=PICTURES",
    )
    print(model)


def _segment(config: SegmentConfig, folder: Path) -> None:
    from training.segment.run import segment

    task = segment(config, folder)
    _tell_summary(folder)
    found = json.loads((task / "task.json").read_text(encoding="utf-8"))["training"]["test"]
    say(
        f"of the test pictures mIoU is {found['miou']:.2f} % and {found['pixel_accuracy']:.2f} % "
        "of the pixels are right, at its source rate"
    )
    full = config.method == "full"
    encoder = BackboneConfig(name=str(task.parent / "model")) if full else config.backbone
    _tell_next(
        f"tocom-train evaluate-segment segment-rates {_of(encoder)} task={_word(task)} "
        f"scenes.path={_word(config.scenes.path)} ladder=around-mlp",
    )
    print(task)


def _evaluate_segment(config: EvaluateSegmentConfig, folder: Path) -> None:
    from training.segment.measure import evaluate_segment

    path = evaluate_segment(config, folder)
    _tell_table(path.with_suffix(".md"))
    print(path)


def _evaluate(config: EvaluateConfig, folder: Path) -> None:
    from training.evaluate import evaluate

    path = evaluate(config, folder)
    _tell_table(path.with_suffix(".md"))
    print(path)


def _compare(config: CompareConfig, folder: Path) -> None:
    from training.ladders.compare import compare_methods

    path = compare_methods(config, folder)
    _tell_table(path.with_suffix(".md"))
    print(path)


def _analyse(config: AnalyseConfig, folder: Path) -> None:
    from training.analysis.analyse import analyse

    path = analyse(config, folder)
    _tell_table(path.with_suffix(".md"))
    print(path)


def _calibrate(config: CalibrateConfig, folder: Path) -> None:
    from training.calibrate import calibrate

    path = calibrate(config, folder)
    say(json.loads(path.read_text(encoding="utf-8"))["summary"])
    print(path)


def _calibrate_cascade(config: CascadeConfig, folder: Path) -> None:
    from training.cascade.calibrate import calibrate_cascade

    path = calibrate_cascade(config, folder)
    _tell_table(path.with_suffix(".md"))
    model = config.task or config.backbone.name
    _tell_next(
        *([f"tocom-train attach {_word(path)} {_word(model)}"] if Path(model).is_dir() else []),
        _serve(config.name, config.backbone, task=config.task, bank=config.bank, cascade=path),
    )
    print(path)


def _vtab(config: VtabConfig, folder: Path) -> None:
    from training.vtab.runs import vtab

    path = vtab(config, folder)
    _tell_table(path)
    print(path)


def _tell_table(path: Path) -> None:
    from training.screen.summary import aligned

    say(f"\n{aligned(path.read_text(encoding='utf-8'))}\n")


def _tell_summary(folder: Path) -> None:
    from training.screen.summary import summary

    say(f"\n{summary(folder)}")


def _tell_next(*commands: str) -> None:
    say("\n".join(["next, for example:", *(f"  {command}" for command in commands), ""]))


def _serve(name: str, backbone: BackboneConfig, **parts: Path | str | None) -> str:
    parts |= {"architecture": backbone.architecture}
    given = [f"{key}={part}" for key, part in parts.items() if part is not None]
    return f"tocom-serve --model {_word(','.join([f'{name}={backbone.name}', *given]))}"


def _of(backbone: BackboneConfig) -> str:
    """Return the model as the commands that measure are told of it."""
    said = f"backbone.name={_word(backbone.name)}"
    if backbone.architecture is not None:
        said += f" backbone.architecture={backbone.architecture}"
    return said


def _word(text: Path | str) -> str:
    """Return a word as a shell takes it."""
    return shlex.quote(str(text))


#: By name: each takes its recipe and its run folder.
COMMANDS: dict[str, Callable[[Any, Path], None]] = {
    "search": _search,
    "distill": _distill,
    "elastic": _elastic,
    "finetune": _finetune,
    "prune": _prune,
    "segment": _segment,
    "evaluate": _evaluate,
    "evaluate-segment": _evaluate_segment,
    "compare": _compare,
    "analyse": _analyse,
    "calibrate": _calibrate,
    "calibrate-cascade": _calibrate_cascade,
    "vtab": _vtab,
}
