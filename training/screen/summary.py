"""What a training run tells when it is done: what was measured before and after, and the time."""

from itertools import groupby
from pathlib import Path

from training.run_folder import read_metrics
from training.screen.curves import Curves, Watched, figure, mean_loss
from training.screen.progress import duration

#: Parts of a run whose mean loss is told: the first and the last of so many.
_PARTS = 10


def summary(folder: Path) -> str:
    """Return a few lines on a run that is done, from its metrics."""
    lines = read_metrics(folder)
    if not lines:
        return f"done, in {folder}"
    curves = Curves.of(lines)
    part = max(1, len(lines) // _PARTS)
    first, last = mean_loss(curves.losses[:part]), mean_loss(curves.losses[-part:])
    over = "" if part == 1 else f" (means of {part:,} steps)"
    seconds = sum(line["seconds"] for line in lines)
    said = [
        f"{len(lines):,} steps in {duration(seconds)}: loss {figure(first)} to {figure(last)}{over}"
    ]
    if curves.watched:
        said.append(aligned(_table(curves.watched)))
    said.append(f"all of it is in {folder}")
    return "\n".join(said)


def aligned(text: str) -> str:
    """Return text whose Markdown tables have columns of one width."""
    found: list[str] = []
    for is_table, lines in groupby(text.splitlines(), lambda line: line.startswith("|")):
        if not is_table:
            found += lines
            continue
        rows = [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in lines]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        for row in rows:
            cells = [
                "-" * width if set(cell) == {"-"} else cell.ljust(width)
                for cell, width in zip(row, widths, strict=True)
            ]
            found.append(f"| {' | '.join(cells)} |")
    return "\n".join(found)


def _table(watched: list[Watched]) -> str:
    """Return a Markdown table of the first and the last figures, and of the plain ones."""
    first, last = watched[0], watched[-1]
    columns = {"plain": last.plain} if last.plain else {}
    columns |= {f"step {each.step:,}": each.now for each in (first, last)}
    before, *_ = columns.values()  # of what is compared with: plain, or measured first
    header = [f"unseen {last.name} at rate", *columns, "change"]
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    for rate, now in last.now.items():
        cells = [figure(figures[rate]) if rate in figures else "" for figures in columns.values()]
        change = f"{100 * (now / before[rate] - 1):+.0f} %" if before.get(rate) else ""
        lines.append(f"| {' | '.join([str(rate), *cells, change])} |")
    return "\n".join(lines)
