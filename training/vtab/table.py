"""The table of many runs: accuracy of a task, mean of a group, mean of the groups.

Reference: ToCom, section 4.1 and Table 5.
"""

import statistics
from collections.abc import Callable
from typing import Any

from training.vtab.tasks import Task


def table(rows: list[dict[str, Any]], chosen: list[Task]) -> str:
    """Return top-1 by task, group and over all, plain / with the bank: a line a (source, target).

    Args:
        rows: of task, source, target, seed, plain and, where there is a delta, bank.
        chosen: the tasks, in the order of their columns.
    """
    present = [task for task in chosen if any(row["task"] == task.folder for row in rows)]
    groups = list(dict.fromkeys(task.group for task in present))
    header = ["source", "rate", *(task.name for task in present), *groups, "mean of groups"]
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    for source, target in dict.fromkeys((row["source"], row["target"]) for row in rows):
        cell = [row for row in rows if (row["source"], row["target"]) == (source, target)]
        means = {what: _means(cell, what, present) for what in ("plain", "bank")}
        figures = [
            " / ".join(f"{means[what][column]:.1f}" for what in means if column in means[what])
            or "-"
            for column in [*(task.folder for task in present), *groups, "all"]
        ]
        lines.append(f"| {source} | {target} | {' | '.join(figures)} |")
    seeds = len({row["seed"] for row in rows})
    return "\n".join(
        [f"Top-1 in %, plain merging / with the bank; mean of {seeds} seeds.", "", *lines, ""]
    )


def _means(rows: list[dict[str, Any]], what: str, present: list[Task]) -> dict[str, float]:
    """Return top-1 by task, by group and, as `all`, the mean of the groups."""
    found: dict[str, float] = {}
    for task in present:
        values = [row[what]["top1"] for row in rows if row["task"] == task.folder and what in row]
        if values:
            found[task.folder] = statistics.fmean(values)
    by_group: dict[str, list[float]] = {}
    for task in present:
        if task.folder in found:
            by_group.setdefault(task.group, []).append(found[task.folder])
    groups = {group: statistics.fmean(values) for group, values in by_group.items()}
    if groups:
        found |= groups | {"all": statistics.fmean(groups.values())}
    return found


def mean_over_tasks(rows: list[dict[str, Any]], chosen: list[Task]) -> list[dict[str, Any]]:
    """Return a row for each (source, target): the mean over tasks, each the mean of its seeds."""
    matrix = []
    for source, target in dict.fromkeys((row["source"], row["target"]) for row in rows):
        cell = [row for row in rows if (row["source"], row["target"]) == (source, target)]
        mean: dict[str, Any] = {"source": source, "target": target}
        for what in ("plain", "bank"):
            with_it = [row for row in cell if what in row]
            if with_it:
                mean[what] = {
                    measure: _mean_of_tasks(with_it, chosen, lambda row: row[what][measure])  # noqa: B023
                    for measure in ("top1", "agreement", "kl")
                }
        matrix.append(mean)
    return matrix


def _mean_of_tasks(
    rows: list[dict[str, Any]], chosen: list[Task], value: Callable[[dict[str, Any]], float]
) -> float:
    by_task = [[value(row) for row in rows if row["task"] == task.folder] for task in chosen]
    return statistics.fmean(statistics.fmean(values) for values in by_task if values)
