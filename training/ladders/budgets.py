"""The best that fits each budget of multiply-adds, and how sure that is.

Every name is there with its best rung that costs at most the budget. Whoever is best of all is
compared with each of the others on the same pictures: a paired difference of KL with its standard
error, and exact sign tests of agreement and top-1 (McNemar's test, in its exact form). Where there
are several seeds, a picture counts by their mean. P-values are not corrected for the number of
rivals.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from training.evaluate import sign_test
from training.measuring import MEASURES, standard_error

_NEAR = 0.005  # over the budget, as a share of it: ladders are made of whole tokens


def budgets(
    rows: Sequence[dict[str, Any]],
    pictures: Tensor,
    shares: Sequence[float],
    judge: str,
    measures: Sequence[str],
) -> list[dict[str, Any]]:
    """Return for each budget the row that is best and how the others compare; see above.

    Args:
        rows: of all candidates, the stock model first.
        pictures: their figures on each picture [rows, P, 3].
        shares: the budgets, as shares of the stock model's multiply-adds.
        judge: the measure that says what is best.
        measures: that were measured.
    """
    sign = 1 if judge == "kl" else -1

    def losses(i: int) -> float:
        return sign * float(rows[i][judge])

    found = []
    for share in shares:
        fitting: dict[tuple[str, bool], list[int]] = {}
        for i, row in enumerate(rows):
            if row["share"] <= share * (1 + _NEAR):
                fitting.setdefault((row["name"], row["bank"]), []).append(i)
        if not fitting:
            continue
        best, *others = sorted((min(each, key=losses) for each in fitting.values()), key=losses)
        found.append(
            {
                "share": share,
                "best": _named(rows[best]),
                "rivals": [
                    _named(rows[other]) | _paired(pictures[best], pictures[other], measures)
                    for other in others
                ],
            }
        )
    return found


def _named(row: dict[str, Any]) -> dict[str, Any]:
    return {key: row[key] for key in ("name", "rung", "bank")}


def _paired(best: Tensor, other: Tensor, measures: Sequence[str]) -> dict[str, Any]:
    """Compare two candidates by their figures on the same pictures [P, 3].

    Returns:
        Of KL how much more the other has, and the standard error of that; of the others on how many
        pictures the best is more, on how many less, and the p-value of a sign test.
    """
    paired: dict[str, Any] = {}
    for i, name in enumerate(MEASURES[:2]):
        if name in measures:
            won, lost = int((best[:, i] > other[:, i]).sum()), int((best[:, i] < other[:, i]).sum())
            paired |= {f"{name}_won": won, f"{name}_lost": lost}
            paired[f"{name}_p"] = float(f"{sign_test(won, lost):.4g}")
    more = other[:, 2] - best[:, 2]
    paired["kl_more"] = float(more.mean())
    paired["kl_more_se"] = standard_error(float(more.sum()), float(more.square().sum()), len(more))
    return paired
