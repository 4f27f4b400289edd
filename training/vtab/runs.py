"""Many tasks, sources, targets and seeds: fine-tuning, measuring and the table of it all.

A run (task, source, seed) has a folder of its own, with what `finetune`, `evaluate` and, where a
multiplier is searched, `calibrate` make. What is there is not done again; what was measured of a
shorter run is kept beside what is measured of the longer one. Runs know nothing of each other, so
that they may be shared out to processes; a table of what there is so far can be made at any time.
What was measured with another bank or at other targets is kept beside what is measured now.

Reference: ToCom, section 4.1 and Table 5: accuracy of a task, mean of a group, mean of the groups.
"""

import json
import multiprocessing
import os
import re
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

import torch

from adapters import open_bank
from adapters.durable import replace_file
from adapters.ladder import digest
from tocom import ConfigError, DataError, cost, load_backbone
from training.calibrate import calibrate
from training.config import FinetuneConfig
from training.evaluate import evaluate
from training.finetune import finetune
from training.ladders.chosen import chosen_ladder
from training.learned.weights import check_learns
from training.measuring import refuse_processes
from training.measuring_config import CalibrateConfig, EvaluateConfig
from training.plot import plot_matrix
from training.presets import read_recipe
from training.recipe import Recipe
from training.run_folder import OtherRunError, refuse_other_run
from training.screen.progress import Progress, say, silence
from training.vtab import tasks
from training.vtab.config import TaskConfig, VtabConfig
from training.vtab.table import mean_over_tasks, table
from training.vtab.tasks import Parts, Task

#: Folders of a run.
EVALUATION, CALIBRATION, SEARCHED = "evaluation", "calibration", "evaluation-searched"


@dataclass(frozen=True)
class Run:
    """One fine-tuning and what is measured of it."""

    task: Task
    source: int
    seed: int

    def folder(self, root: Path) -> Path:
        """Return its folder below that of all."""
        return root / self.task.folder / f"source-{self.source}" / f"seed-{self.seed}"


def vtab(config: VtabConfig, folder: Path) -> Path:
    """Do all runs that are not done yet and return the path of the table.

    Raises:
        BackboneError, BankError, ConfigError, DataError, ReductionError: before any compute is
            spent.
    """
    refuse_processes("vtab")
    chosen = chosen_tasks(config)
    check(config)
    runs = [
        Run(task, source, seed)
        for seed in config.seeds
        for task in chosen
        for source in config.sources
    ]
    for run in runs:
        recipe = _recipe(config, run)  # refuses what no run could begin with
        refuse_other_run(run.folder(folder), recipe)
    check_bank(config)
    check_rates(config)
    if config.jobs == 1:
        for number, run in enumerate(runs, start=1):
            what = f"{run.task.name}, source {run.source}, seed {run.seed}"
            say(f"run {number} of {len(runs)}: {what}")
            _do(config, run, folder)
    else:
        _share_out(config, runs, folder)
    return report(config, folder)


def check(config: VtabConfig) -> str:
    """Return a line that says that all data is there.

    Raises:
        DataError: with a line for everything that is missing or wrong.
    """
    chosen = chosen_tasks(config)
    problems = [line for task in chosen for line in tasks.check(Path(config.root), task)]
    if problems:
        raise DataError("\n  ".join([f"{config.root} is not complete:", *problems]))
    return f"{config.root}: {len(chosen)} tasks are complete"


def check_bank(config: VtabConfig) -> None:
    """Check that the bank, if there is one, fits the models of all runs.

    Raises:
        BackboneError, BankError, ConfigError, ReductionError: naming what does not fit.
    """
    if not config.bank:
        return
    bank, task, backbone = open_bank(config.bank), chosen_tasks(config)[0], None
    name, highest = bank.info.name, bank.info.max_rate
    for rate in (*config.sources, *config.targets):
        if rate > highest:
            raise ConfigError(f"bank {name!r} has the rates 0 to {highest}, got {rate}")
    for source in config.sources:
        recipe = _recipe(config, Run(task, source, config.seeds[0]))
        if bank.info.proportional != recipe.proportional:
            raise ConfigError(
                f"bank {name!r} is for proportional={bank.info.proportional}, the "
                f"fine-tuning for {recipe.proportional}: give proportional={bank.info.proportional}"
            )
        backbone = backbone or load_backbone(recipe.backbone.name, recipe.backbone.architecture)
        ladder, proportional = chosen_ladder(recipe.ladder, backbone.model), recipe.proportional
        # Like the model that a run makes.
        tuned = replace(backbone, source=source, ladder=ladder, proportional=proportional)
        bank.check_fits(tuned)
        if recipe.ladder is not None and digest(ladder) != digest(bank.ladder):
            raise ConfigError(
                f"bank {name!r} is for the ladder {bank.ladder.name!r}, the fine-tuning for "
                f"{ladder.name!r}"
            )


def check_rates(config: VtabConfig) -> None:
    """Check that models can be tuned at all sources, and measured at all targets.

    Raises:
        ConfigError, RateError, ReductionError: naming the rate, or what does not fit.
    """
    recipe = _recipe(config, Run(chosen_tasks(config)[0], config.sources[0], config.seeds[0]))
    model = load_backbone(recipe.backbone.name, recipe.backbone.architecture).model
    ladder = chosen_ladder(recipe.ladder, model)
    for source in config.sources:
        check_learns(ladder, source, model)
    targets = () if config.bank else config.targets  # with a bank they are its rates
    for rate in (*config.sources, *targets):
        cost(model, rate, ladder=ladder)  # refuses rates that the ladder does not have


def chosen_tasks(config: VtabConfig) -> list[Task]:
    """Return the tasks of a recipe.

    Raises:
        ConfigError: naming those that there are, if it names another.
    """
    known = {task.folder: task for task in tasks.VTAB}
    chosen = []
    for task in config.tasks or known:
        if isinstance(task, TaskConfig):
            chosen.append(_described(task))
        elif task in known:
            chosen.append(known[task])
        else:
            raise ConfigError(f"VTAB-1k has no task {task!r}; it has: {', '.join(known)}")
    return chosen


def _described(task: TaskConfig) -> Task:
    parts = tasks.VTAB_1K
    if task.pictures is not None and task.test is not None:
        parts = Parts(task.pictures, task.test, task.train, task.validation)
    return Task(
        task.name, task.folder, task.group, task.classes, task.test_count, task.train_count, parts
    )


def report(config: VtabConfig, folder: Path) -> Path:
    """Make tables and plots of the runs that are done and return the path of the first.

    Raises:
        ConfigError: if none is.
    """
    rows = list(_rows(config, folder))
    if not rows:
        raise ConfigError(f"{folder} holds no finished run")
    matrix = mean_over_tasks(rows, chosen_tasks(config))
    folder.mkdir(parents=True, exist_ok=True)
    plot_matrix(
        {
            "model": f"{len({row['task'] for row in rows})} tasks, {len(config.seeds)} seeds",
            "pictures": {"name": config.name},
            "rows": matrix,
        },
        folder,
    )
    replace_file(folder / "vtab.json", json.dumps({"rows": rows, "mean": matrix}, indent=1) + "\n")
    path = folder / "vtab.md"
    replace_file(path, table(rows, chosen_tasks(config)))
    return path


def _rows(config: VtabConfig, folder: Path) -> Iterable[dict[str, Any]]:
    for task in chosen_tasks(config):
        for source in config.sources:
            for seed in config.seeds:
                run = Run(task, source, seed)
                for row in _measured(run.folder(folder)):
                    yield {"task": task.folder, "seed": seed, **row}


def _measured(own: Path) -> list[dict[str, Any]]:
    """Return the rows of a run; empty if it is not done.

    Where a multiplier was searched, a row with a bank has `searched`: it, and what it gives.
    """
    rows = _rows_of(own / EVALUATION)
    found = own / CALIBRATION / "calibration.json"
    if not found.exists():
        return rows
    calibration = json.loads(found.read_text(encoding="utf-8"))
    multiplier = calibration["multiplier"]
    is_own = multiplier == calibration["bank"]["scale"]
    others = {row["target"]: row for row in (rows if is_own else _rows_of(own / SEARCHED))}
    for row in rows:
        if "bank" in row and row["target"] in others:
            row["searched"] = {"multiplier": multiplier, **others[row["target"]]["bank"]}
    return rows


def _rows_of(evaluation: Path) -> list[dict[str, Any]]:
    path = evaluation / "evaluation.json"
    if not path.exists():
        return []
    rows: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["rows"]
    return rows


def _recipe(config: VtabConfig, run: Run) -> FinetuneConfig:
    """Return the fine-tuning of a run."""
    root, task = Path(config.root), run.task

    def lists(**parts: str) -> list[str]:
        # JSON's strings are TOML's too.
        sets = []
        for key, name in parts.items():
            part = task.pictures(root, name)
            where = f"path={json.dumps(part.path)}"
            where += "" if part.list is None else f", list={json.dumps(part.list)}"
            sets.append(f"{key.replace('_', '.')}={{{where}}}")
        return sets

    given = [
        *config.changes,
        *lists(pictures=task.parts.all, test=task.parts.test),
        f"name={json.dumps(_slug(task.folder))}",
        f"classes={task.classes}",
        f"source={run.source}",
        f"loop.seed={run.seed}",
    ]
    recipe = read_recipe(FinetuneConfig, config.recipe, given)
    train, validation = task.parts.train, task.parts.validation
    if recipe.search is not None and train is not None and validation is not None:
        given += lists(search_train=train, search_validation=validation)
        recipe = read_recipe(FinetuneConfig, config.recipe, given)
    own = {"ladder": config.ladder, "proportional": config.proportional}
    return recipe.model_copy(update={key: value for key, value in own.items() if value is not None})


def _slug(folder: str) -> str:
    """Return a folder as a name of a recipe may be."""
    return re.sub(r"[^a-z0-9._-]+", "-", folder.lower()).lstrip("._-")[:100] or "task"


def _do(config: VtabConfig, run: Run, folder: Path) -> None:
    """Do what is not done yet of a run; what was measured otherwise is kept beside it."""
    recipe, own = _recipe(config, run), run.folder(folder)
    if shorter := refuse_other_run(own, recipe):
        for name in (EVALUATION, CALIBRATION, SEARCHED):
            if (own / name).exists():
                (own / name).rename(own / f"{name}-{shorter}")
    finished = finetune(recipe, own)
    tuned_on = recipe.backbone
    full = recipe.method == "full"
    targets = [target for target in config.targets if target != run.source]
    searched = bool(config.bank and config.multipliers and targets)
    asked = EvaluateConfig(
        name=run.task.folder,
        backbone=tuned_on.model_copy(update={"name": str(finished), "architecture": None})
        if full
        else tuned_on,
        task=None if full else str(finished),
        model=f"{run.task.name}, source {run.source}",
        bank=config.bank,
        ladder=recipe.ladder,
        proportional=recipe.proportional,
        # Its own, whatever calibration somebody attaches to the model meanwhile.
        multiplier=open_bank(config.bank).info.scale if config.bank and searched else None,
        pictures=recipe.test,
        targets=config.targets,
        limit=config.limit,
    )
    _anew(evaluate, asked, own / EVALUATION)
    if not config.bank or not searched:
        for name in (CALIBRATION, SEARCHED):
            _put_aside(own / name)
        return
    # On pictures that it was tuned on: the test pictures are for the test.
    found = _anew(
        calibrate,
        CalibrateConfig(
            backbone=asked.backbone,
            task=asked.task,
            model=asked.model,
            bank=config.bank,
            pictures=recipe.pictures,
            limit=config.multiplier_pictures,
            targets=targets,
            multipliers=config.multipliers,
        ),
        own / CALIBRATION,
    )
    multiplier = json.loads(found.read_text(encoding="utf-8"))["multiplier"]
    if multiplier != asked.multiplier:
        _anew(evaluate, asked.model_copy(update={"multiplier": multiplier}), own / SEARCHED)


def _anew(measure: Callable[[Any, Path], Path], config: Recipe, folder: Path) -> Path:
    """Measure in a folder; what was measured otherwise there is put aside."""
    try:
        return measure(config, folder)
    except OtherRunError:
        _put_aside(folder)
        return measure(config, folder)


def _put_aside(folder: Path) -> None:
    """Rename a folder if it is there: `evaluation` to `evaluation-other-1`, or the next number."""
    if folder.exists():
        names = (folder.with_name(f"{folder.name}-other-{number}") for number in count(1))
        aside = next(name for name in names if not name.exists())
        folder.rename(aside)
        say(f"what was measured otherwise is now {aside}")


def _share_out(config: VtabConfig, runs: list[Run], folder: Path) -> None:
    """Do runs in several processes at once, each with its share of processors and one GPU."""
    context = multiprocessing.get_context("spawn")
    gpus, queue = _visible_gpus(), context.Queue()
    for number in range(config.jobs):
        queue.put(gpus[number % len(gpus)] if gpus else None)
    with ProcessPoolExecutor(
        config.jobs, context, initializer=_start, initargs=(queue, config.jobs)
    ) as pool:
        try:
            futures = [pool.submit(_do, config, run, folder) for run in runs]
            with Progress("runs", len(runs), "run") as progress:
                for future in as_completed(futures):
                    future.result()
                    progress.update()
        except BaseException:
            # A run takes hours, and goes on where it was stopped.
            pool.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                process.terminate()
            raise


def _visible_gpus() -> list[str]:
    """Return the GPUs that this process may use, each as CUDA_VISIBLE_DEVICES names it."""
    count, mask = torch.cuda.device_count(), os.environ.get("CUDA_VISIBLE_DEVICES")
    if mask is None or not count:
        return [str(number) for number in range(count)]
    entries = [entry.strip() for entry in mask.split(",")]
    # Of several slices of GPUs (MIG) a process counts one; CUDA drops what follows an unknown GPU.
    return entries if entries[0].startswith("MIG-") else entries[:count]


def _start(gpus: Any, jobs: int) -> None:
    silence()  # bars of several processes would write over each other
    torch.set_num_threads(max(1, torch.get_num_threads() // jobs))
    if (gpu := gpus.get()) is not None:
        # Before CUDA is used: this process sees one GPU.
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
