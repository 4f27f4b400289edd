"""The table of many runs: accuracy of a task, mean of a group, mean of the groups.

Reference: ToCom, section 4.1 and Table 5.
"""

import statistics
from collections.abc import Callable
from typing import Any

from training.vtab.tasks import Task

#: How a model is run, as rows have it: as it is, with the bank, with a multiplier of its own.
WAYS = ("plain", "bank", "searched")


def table(rows: list[dict[str, Any]], chosen: list[Task]) -> str:
    """Return top-1 by task, group and over all, plain / with the bank: a line a (source, target).

    Where multipliers were searched, then / with the one of each model, and which those are.

    Args:
        rows: of task, source, target, seed, plain and, where there is a delta, bank; and searched.
        chosen: the tasks, in the order of their columns.
    """
    present = [task for task in chosen if any(row["task"] == task.folder for row in rows)]
    groups = list(dict.fromkeys(task.group for task in present))
    header = ["source", "rate", *(task.name for task in present), *groups, "mean of groups"]
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    for source, target in dict.fromkeys((row["source"], row["target"]) for row in rows):
        cell = [row for row in rows if (row["source"], row["target"]) == (source, target)]
        means = {what: _means(cell, what, present) for what in WAYS}
        figures = [
            " / ".join(f"{means[what][column]:.1f}" for what in means if column in means[what])
            or "-"
            for column in [*(task.folder for task in present), *groups, "all"]
        ]
        lines.append(f"| {source} | {target} | {' | '.join(figures)} |")
    seeds = len({row["seed"] for row in rows})
    searched = [row for row in rows if "searched" in row]
    ways = "plain merging / with the bank"
    ways += " / with the multiplier that was searched for each model" if searched else ""
    text = [f"Top-1 in %, {ways}; mean of {seeds} seeds.", "", *lines, ""]
    return "\n".join(text + (_multipliers(searched, present) if searched else []))


def _multipliers(rows: list[dict[str, Any]], present: list[Task]) -> list[str]:
    """Return the lines of a table of the multipliers that were searched, one for each seed."""
    own = " or ".join(f"{scale:g}" for scale in sorted({row["multiplier"] for row in rows}))
    lines = [
        f"Multipliers that were searched; the bank's own is {own}.",
        "",
        f"| source | {' | '.join(task.name for task in present)} |",
        "|---" * (1 + len(present)) + "|",
    ]
    for source in dict.fromkeys(row["source"] for row in rows):
        cells = []
        for task in present:
            found = {
                row["seed"]: row["searched"]["multiplier"]
                for row in rows
                if (row["task"], row["source"]) == (task.folder, source)
            }
            cells.append(", ".join(f"{multiplier:g}" for multiplier in found.values()) or "-")
        lines.append(f"| {source} | {' | '.join(cells)} |")
    return [*lines, ""]


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
        for what in WAYS:
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
