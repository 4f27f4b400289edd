"""`--dry-run`: open everything that a recipe names, and tell what would run."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from adapters import open_bank
from tocom import Backbone
from training.analysis.config import AnalyseConfig
from training.cascade.config import CascadeConfig
from training.config import DistillConfig, ElasticConfig, FinetuneConfig
from training.ladders.compare_config import CompareConfig
from training.ladders.search_config import LadderSearchConfig
from training.measuring_config import CalibrateConfig, EvaluateConfig
from training.prune.config import PruneConfig
from training.recipe import Recipe
from training.segment.config import EvaluateSegmentConfig, SegmentConfig
from training.vtab.config import VtabConfig


def dry_run(config: Recipe, folder: Path) -> str:
    """Return what would run, a line each; nothing is computed, nothing written.

    Args:
        config: the recipe of a command.
        folder: the run folder.

    Raises:
        TocomError: if something that it names cannot be had, or does not fit.
    """
    if isinstance(config, VtabConfig):
        rows = list(_vtab(config))
    elif isinstance(config, SegmentConfig | EvaluateSegmentConfig):
        rows = [*_segment(config), ("folder", _folder(config, folder))]
    else:
        rows = [*_inputs(config), ("folder", _folder(config, folder))]
    width = max(len(what) for what, _ in rows)
    return "\n".join(f"{what:<{width}}  {value}" for what, value in rows)


def _inputs(config: Any) -> Iterator[tuple[str, str]]:
    from training.measuring import load_model
    from training.pictures.sets import open_pictures

    backbone = load_model(config.backbone, getattr(config, "task", None), config.crop_pct)
    weights = sum(each.numel() for each in backbone.model.parameters())
    yield "device", str(next(backbone.model.parameters()).device)
    yield "model", f"{backbone.name}, {weights / 1e6:.1f} M parameters"
    sets = config.pictures if isinstance(config.pictures, tuple) else (config.pictures,)
    counts = [len(open_pictures(each)) for each in sets]
    for each, count in zip(sets, counts, strict=True):
        yield "pictures", f"{each.path}: {count:,}"
    if getattr(config, "bank", None) is not None:
        bank = open_bank(config.bank)
        yield "bank", f"{bank.info.name}, rates 0 to {bank.info.max_rate} of {bank.ladder.name}"
    match config:
        case DistillConfig():
            _distill(config, backbone)
            yield "steps", _steps(config, backbone)
        case ElasticConfig():
            _elastic(config, backbone)
            yield "tuned", f"all weights, at the rates 0 to {config.max_rate}"
            yield "steps", _steps(config, backbone)
        case FinetuneConfig():
            yield from _finetune(config, counts[0])
        case PruneConfig():
            yield "pruned", _prune(config)
            yield "steps", _steps(config, backbone)
        case EvaluateConfig():
            yield "run", _evaluate(config, backbone)
        case CalibrateConfig():
            yield "run", _calibrate(config, backbone)
        case CascadeConfig():
            yield "run", _cascade(config, sum(counts))
        case CompareConfig() | AnalyseConfig():
            yield "run", f"{len(config.entries)} methods and ladders beside the stock model"
            rungs = _compare(config) if isinstance(config, CompareConfig) else _analyse(config)
            yield "rungs", f"{rungs}, with banks and seeds"
        case LadderSearchConfig():
            yield "run", _search(config, backbone)


# Each calls what the run begins with, which refuses what does not fit together.


def _distill(config: DistillConfig, backbone: Backbone) -> None:
    import torch

    from training.distill import Distillation

    # What is measured for relative losses is left out; a metric begins from a blank picture.
    blank = torch.zeros(1, *backbone.input_size)
    Distillation(backbone, config.model_copy(update={"relative": False}), [blank])


def _elastic(config: ElasticConfig, backbone: Backbone) -> None:
    from training.elastic import tuned_ladder

    tuned_ladder(backbone, config)


def _steps(config: DistillConfig | ElasticConfig | PruneConfig, backbone: Backbone) -> str:
    from training.pictures.batches import split_off

    pictures, held_out = split_off(backbone, config)
    seen = config.loop.steps * config.loop.batch_size / len(pictures.keys())
    return (
        f"{config.loop.steps:,} of {config.loop.batch_size} pictures, each seen "
        f"{seen:.3g} times; {len(held_out)} held out"
    )


def _finetune(config: FinetuneConfig, count: int) -> Iterator[tuple[str, str]]:
    from training.finetune import check_inputs

    classes = check_inputs(config)
    yield "classes", f"{len(classes)}: {', '.join(classes[:5])}{', ...' * (len(classes) > 5)}"
    yield "tuned", f"{config.method}, at rate {config.source}"
    if config.search and config.search.values:
        yield "search", f"{config.search.key}: {', '.join(map(str, config.search.values))}"
    loop = config.loop.over(count)
    yield "steps", f"{loop.steps:,} of {loop.batch_size} pictures, {config.loop.epochs:g} epochs"


def _prune(config: PruneConfig) -> str:
    from training.prune.prune import Pruning, load

    Pruning(load(config), config, [])
    return f"{100 * config.target:g} % of the multiply-adds, by step {config.last_choice + 1:,}"


def _evaluate(config: EvaluateConfig, backbone: Backbone) -> str:
    from training.evaluate import measurement_of, opened

    measurement = measurement_of(config, backbone, opened(config, backbone))
    return f"{measurement.count:,} pictures at every rate"


def _calibrate(config: CalibrateConfig, backbone: Backbone) -> str:
    from training.calibrate import opened

    _, _, targets = opened(config, backbone)
    count = len(config.multipliers)
    return f"{count} multipliers and the bank's own, at {len(targets)} rates"


def _cascade(config: CascadeConfig, available: int) -> str:
    from training.cascade.calibrate import Calibrated

    rates = ", ".join(map(str, Calibrated.open(config).rates))
    count = min(available, config.limit or available)
    return f"{count:,} pictures at the rates {rates}, chains of up to {config.runs} runs"


def _compare(config: CompareConfig) -> int:
    from training.ladders.compare import opened

    candidates, _ = opened(config)
    return len(candidates) - 1  # but the stock model


def _analyse(config: AnalyseConfig) -> int:
    from training.analysis.analyse import opened

    groups, _, _ = opened(config)
    return sum(len(candidates) - 1 for _, candidates in groups)


def _search(config: LadderSearchConfig, backbone: Backbone) -> str:
    from training.ladders.search import opened

    opened(config, backbone)
    return f"{len(config.shares)} rungs, {config.tries} tries for each"


def _segment(config: SegmentConfig | EvaluateSegmentConfig) -> Iterator[tuple[str, str]]:
    from tocom import load_backbone
    from training.segment.run import check_inputs, load_segmenter
    from training.segment.scenes import SceneSet, classes_of

    if isinstance(config, EvaluateSegmentConfig):
        segmenter = load_segmenter(
            config.backbone.name, config.backbone.architecture, config.task, "cpu"
        )
        labelled = config.scenes.of_task(segmenter.info)
        scenes = SceneSet(labelled, config.test, classes_of(labelled))
        yield "model", f"{config.backbone.name} with the task {segmenter.info.name}"
        if config.bank is not None:
            bank = open_bank(config.bank)
            bank.check_fits(segmenter.backbone, segmenter.backbone.source)
            yield "bank", f"{bank.info.name}, rates 0 to {bank.info.max_rate} of {bank.ladder.name}"
        yield "run", f"{min(len(scenes), config.limit or len(scenes)):,} pictures at every rate"
        return
    backbone = load_backbone(config.backbone.name, config.backbone.architecture)
    classes, splits = check_inputs(config, backbone)
    yield "model", backbone.name
    yield "classes", f"{len(classes.names)}: {', '.join(classes.names[:5])}"
    for name, scenes in splits.items():
        yield "pictures", f"{name}: {len(scenes):,}"
    yield "tuned", f"{config.method}, at rate {config.source}"
    loop = config.loop.over(len(splits[config.train]))
    yield "steps", f"{loop.steps:,} of {loop.batch_size} pictures, {config.loop.epochs:g} epochs"


def _vtab(config: VtabConfig) -> Iterator[tuple[str, str]]:
    from training.vtab.runs import check, check_bank, check_rates, chosen_tasks

    yield "pictures", check(config)
    if config.bank:
        check_bank(config)
        yield "bank", config.bank
    check_rates(config)
    tasks, sources, seeds = len(chosen_tasks(config)), len(config.sources), len(config.seeds)
    yield "runs", f"{tasks * sources * seeds}: {tasks} tasks, {sources} sources, {seeds} seeds"


def _folder(config: Recipe, folder: Path) -> str:
    """Say whether a run folder is new, or gone on with; what holds another run is refused."""
    from training.run_folder import refuse_other_measurement, refuse_other_run

    if not (folder / "config.json").exists():
        return f"{folder}, new"
    if not hasattr(config, "loop"):  # it measures, it does not train
        return f"{folder}, {'gone on with' if refuse_other_measurement(folder, config) else 'new'}"
    longer = refuse_other_run(folder, config).replace("-", " ")
    return f"{folder}, gone on with{f' after its {longer}' if longer else ''}"
