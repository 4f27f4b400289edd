"""What the commands of `tocom-train` do; each imports what it needs."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from training.config import DistillConfig, ElasticConfig, FinetuneConfig
from training.ladders.compare_config import CompareConfig
from training.ladders.search_config import LadderSearchConfig
from training.measuring_config import CalibrateConfig, EvaluateConfig
from training.vtab.config import VtabConfig


def _search(config: LadderSearchConfig, folder: Path) -> None:
    from training.ladders.search import search

    path = search(config, folder)
    print((path.parent / "search.md").read_text(encoding="utf-8"), file=sys.stderr)
    print(path)


def _distill(config: DistillConfig, folder: Path) -> None:
    from training.distill import distill

    print(distill(config, folder))


def _elastic(config: ElasticConfig, folder: Path) -> None:
    from training.elastic import elastic

    print(elastic(config, folder))


def _finetune(config: FinetuneConfig, folder: Path) -> None:
    from training.finetune import finetune

    print(finetune(config, folder))


def _evaluate(config: EvaluateConfig, folder: Path) -> None:
    from training.evaluate import evaluate

    print(evaluate(config, folder))


def _compare(config: CompareConfig, folder: Path) -> None:
    from training.ladders.compare import compare_methods

    print(compare_methods(config, folder))


def _calibrate(config: CalibrateConfig, folder: Path) -> None:
    from training.calibrate import calibrate

    path = calibrate(config, folder)
    print(json.loads(path.read_text(encoding="utf-8"))["summary"], file=sys.stderr)
    print(path)


def _vtab(config: VtabConfig, folder: Path) -> None:
    from training.vtab.runs import vtab

    print(vtab(config, folder))


#: By name: each takes its recipe and its run folder.
COMMANDS: dict[str, Callable[[Any, Path], None]] = {
    "search": _search,
    "distill": _distill,
    "elastic": _elastic,
    "finetune": _finetune,
    "evaluate": _evaluate,
    "compare": _compare,
    "calibrate": _calibrate,
    "vtab": _vtab,
}
