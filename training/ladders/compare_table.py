"""What `tocom-train compare` found, as Markdown."""

from collections.abc import Iterator, Sequence
from typing import Any


def called(row: dict[str, Any]) -> str:
    """Return how tables and plots call a candidate."""
    return f"{row['name']} + bank" if row["bank"] else str(row["name"])


def table(result: dict[str, Any]) -> str:
    """Return all rows and the best of each budget as Markdown."""
    pictures = result["pictures"]
    lines = [
        f"{result['model']}, {pictures['count']} pictures of {pictures['name']}. ± is the "
        "standard error, or, of several seeds, their standard deviation. In bold: nothing else is "
        "as cheap and as close to the stock model.",
        "",
        *_rows(result["rows"]),
        "",
        f"The best that fits each budget, by {_JUDGES[result['judge']]}, and the next two, picture "
        "by picture: KL that they have more ± its standard error, and p-values of exact sign "
        "tests.",
        "",
        *_budgets(result["budgets"], "top1" in result["rows"][0]),
    ]
    return "\n".join([*lines, ""])


_JUDGES = {"kl": "KL", "agreement": "agreement", "top1": "top-1"}
_RIVALS = 2  # in the table; compare.json has all


def _rows(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    labelled = "top1" in rows[0]
    timed = sorted({how for row in rows for how in row.get("ms", {})})
    header = ["method", "rung", "GMACs", "share", "parameters, M"]
    header += [*(["top-1, %"] if labelled else []), "agreement, %", "KL"]
    yield from _head([*header, *(f"{how}, ms" for how in timed)])
    for row in rows:
        seeds = row.get("seeds", {})
        error = seeds.get("kl", row.get("kl_se"))
        kl = f"{row['kl']:.4f}" + (f" ± {error:.4f}" if error else "")
        cells = [called(row), str(row["rung"]), f"{row['gmacs']:.3f}", f"{row['share']:.3f}"]
        cells += [f"{row['parameters'] / 1e6:.2f}"]
        for name in ["top1", "agreement"] if labelled else ["agreement"]:
            cells += [f"{row[name]:.1f}" + (f" ± {seeds[name]:.1f}" if seeds else "")]
        cells += [f"**{kl}**" if row["best"] else kl]
        cells += [f"{row['ms'][how]:.1f}" if how in row.get("ms", {}) else "" for how in timed]
        yield _line(cells)


def _budgets(found: Sequence[dict[str, Any]], labelled: bool) -> Iterator[str]:
    tests = ["top1", "agreement"] if labelled else ["agreement"]
    yield from _head(
        ["budget", "best", "rung", "next", "rung", "KL more", *(f"p, {t}" for t in tests)]
    )
    for budget in found:
        best = budget["best"]
        cells = [f"{budget['share']:g}", f"**{called(best)}**", str(best["rung"])]
        if not budget["rivals"]:
            yield _line([*cells, *[""] * (3 + len(tests))])
        for rival in budget["rivals"][:_RIVALS]:
            more, error = rival["kl_more"], rival["kl_more_se"]
            difference = f"{more:.4f}" + (f" ± {error:.4f}" if error is not None else "")
            chances = [f"{rival[f'{test}_p']:.2g}" for test in tests]
            yield _line([*cells, called(rival), str(rival["rung"]), difference, *chances])
            cells = ["", "", ""]


def _head(names: Sequence[str]) -> Iterator[str]:
    yield _line(names)
    yield "|" + "---|" * len(names)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
