"""`--dry-run`: open everything that a recipe names, and tell what would run."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from adapters import open_bank
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
    from training.measuring import class_indices, load_model
    from training.pictures.sets import open_pictures

    backbone = load_model(config.backbone, getattr(config, "task", None))
    weights = sum(each.numel() for each in backbone.model.parameters())
    yield "device", str(next(backbone.model.parameters()).device)
    yield "model", f"{backbone.name}, {weights / 1e6:.1f} M parameters"
    sets = config.pictures if isinstance(config.pictures, tuple) else (config.pictures,)
    counts = [len(open_pictures(each)) for each in sets]
    for each, count in zip(sets, counts, strict=True):
        yield "pictures", f"{each.path}: {count:,}"
    if isinstance(config, EvaluateConfig | CompareConfig | AnalyseConfig) and config.labelled:
        class_indices(config.pictures, backbone)
    if getattr(config, "bank", None) is not None:
        bank = open_bank(config.bank)
        sources = getattr(config, "sources", ()) or (getattr(config, "source", None),)
        bank.check_fits(backbone, sources[0])
        yield "bank", f"{bank.info.name}, rates 0 to {bank.info.max_rate} of {bank.ladder.name}"
    match config:
        case DistillConfig():
            yield "steps", _distill(config, backbone, sum(counts))
        case ElasticConfig():
            yield "tuned", f"all weights, at the rates 0 to {config.max_rate}"
            yield "steps", f"{config.loop.steps:,} of {config.loop.batch_size} pictures"
        case FinetuneConfig():
            yield from _finetune(config, counts[0])
        case PruneConfig():
            yield "pruned", _prune(config)
            yield "steps", f"{config.loop.steps:,} of {config.loop.batch_size} pictures"
        case EvaluateConfig():
            yield "run", f"{min(counts[0], config.limit or counts[0]):,} pictures at every rate"
        case CalibrateConfig():
            yield "run", f"{len(config.multipliers)} multipliers and the bank's own"
        case CascadeConfig():
            count = min(sum(counts), config.limit or sum(counts))
            yield "run", f"{count:,} pictures at each rate, chains of up to {config.runs} runs"
        case CompareConfig() | AnalyseConfig():
            yield "run", f"{len(config.entries)} methods and ladders beside the stock model"
            yield "rungs", _candidates(config)
        case LadderSearchConfig():
            yield "run", f"{len(config.shares)} rungs, {config.tries} tries for each"


def _candidates(config: CompareConfig | AnalyseConfig) -> str:
    from training.ladders.candidates import Models, candidates_of

    models = Models(config.crop_pct)
    found = candidates_of(config.entries, config.backbone, config.task, config.shares, models)
    return f"{len(list(found))}, with banks and seeds"


def _distill(config: DistillConfig, backbone: Any, count: int) -> str:
    import torch

    from training.distill import Distillation
    from training.pictures.augment import train_transform
    from training.pictures.batches import Pictures

    pictures = Pictures(config.pictures, train_transform(backbone, config.augment))
    held_out = pictures.hold_out(config.unseen)
    # Refuses what does not fit together; what is measured for relative losses is left out, and a
    # metric begins from a blank picture.
    blank = torch.zeros(1, *backbone.input_size)
    Distillation(backbone, config.model_copy(update={"relative": False}), [blank])
    seen = config.loop.steps * config.loop.batch_size / (count - len(held_out))
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

    Pruning(load(config), config, [])  # refuses what does not fit together
    return f"{100 * config.target:g} % of the multiply-adds, by step {config.last_choice + 1:,}"


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
    from training.vtab.runs import check, check_bank, chosen_tasks

    yield "pictures", check(config)
    if config.bank:
        check_bank(config)
        yield "bank", config.bank
    tasks, sources, seeds = len(chosen_tasks(config)), len(config.sources), len(config.seeds)
    yield "runs", f"{tasks * sources * seeds}: {tasks} tasks, {sources} sources, {seeds} seeds"


def _folder(config: Recipe, folder: Path) -> str:
    """Say whether a run folder is new, or gone on with; what holds another run is refused."""
    from training.run_folder import refuse_other_recipe, refuse_other_run

    if not (path := folder / "config.json").exists():
        return f"{folder}, new"
    then = json.loads(path.read_text(encoding="utf-8"))
    if "recipe" in then:  # what measures writes more than that
        refuse_other_recipe(folder, then["recipe"], config.model_dump(mode="json"))
        return f"{folder}, gone on with"
    longer = refuse_other_run(folder, config).replace("-", " ")
    return f"{folder}, gone on with{f' after its {longer}' if longer else ''}"
