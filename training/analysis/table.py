"""What `tocom-train analyse` found, as Markdown."""

from collections.abc import Iterator
from typing import Any

from training.analysis.pairs import KINDS, MEASURES

_DIFFER = {
    "stock": "a rung and rung 0 of the same model",
    "rungs": "two rungs of the same method and model",
    "methods": "two methods at equal cost on the same model",
    "models": "two models with the same method at equal cost",
}


def table(result: dict[str, Any]) -> str:
    """Return the candidates, and of every kind of pairs what each measure is and says."""
    pictures, labelled = result["pictures"], "top1" in result["rows"][0]
    what = "top-1" if labelled else "agreement with rung 0"
    lines = [
        f"{pictures['count']} pictures of {pictures['name']}; tokens and features after the blocks "
        f"{', '.join(map(str, result['blocks']))}.",
        "",
        *_candidates(result, labelled),
        "",
        "Measures of pairs, in the mean, and their rank correlation with how much "
        f"{what} differs: Spearman's ρ and Kendall's τ.",
    ]
    for kind in KINDS:
        rows = [row for row in result["proxies"] if row["kind"] == kind]
        if rows:
            lines += ["", f"Pairs are {_DIFFER[kind]}:", "", *_proxies(rows)]
    return "\n".join([*lines, ""])


def _candidates(result: dict[str, Any], labelled: bool) -> Iterator[str]:
    header = ["model", "method", "rung", "GMACs", "share", *(["top-1, %"] if labelled else [])]
    yield from _head([*header, "agreement, %", "KL"])
    for row in result["rows"]:
        yield _line(
            [
                row["model"],
                row["method"] + (" + bank" if row["bank"] else ""),
                str(row["rung"]),
                f"{row['gmacs']:.3f}",
                f"{row['share']:.3f}",
                *([f"{row['top1']:.1f}"] if labelled else []),
                f"{row['agreement']:.1f}",
                f"{row['kl']:.4f}",
            ]
        )


def _proxies(rows: list[dict[str, Any]]) -> Iterator[str]:
    yield from _head(["measure", "pairs", "mean", "ρ", "τ"])
    for row in rows:
        signs = ["–" if row[key] is None else f"{row[key]:+.2f}" for key in ("spearman", "kendall")]
        yield _line([MEASURES[row["measure"]], str(row["pairs"]), f"{row['mean']:.4f}", *signs])


def _head(names: list[str]) -> Iterator[str]:
    yield _line(names)
    yield "|" + "---|" * len(names)


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"
