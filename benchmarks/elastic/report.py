"""What `serve_elastic` found, in Markdown."""

from collections.abc import Sequence
from typing import Any

from benchmarks.estimates import markdown, ratios, spread
from benchmarks.load import LATE


def report(result: dict[str, Any]) -> str:
    """Return all that was found."""
    capacities = ", ".join(
        f"{each:.1f} at rate {rate}" for rate, each in result["capacity"].items()
    )
    lines = [
        f"{result['machine']}.\n{result['subject']}.",
        f"Capacity by HTTP, images/s: {capacities}. To be answered within {result['slo_ms']:g} ms. "
        f"Medians of {result['repeats']} rounds, with the lowest and the highest.",
    ]
    for what in result["known"]:
        shares = ", ".join(f"{100 * share:.1f}" for share in result["known"][what])
        lines.append(f"All pictures once, {what} in % at rates 0 to the highest: {shares}.")
    for name, trace in result["traces"].items():
        lines += [f"\n**{name}**: {trace['described']}\n", _table(trace, result), ""]
        lines += _conclusions(trace, list(result["known"]))
    return "\n".join(lines) + "\n"


def _table(trace: dict[str, Any], result: dict[str, Any]) -> str:
    """Return a row for each arm, and one for the oracle."""
    measures = list(result["known"])
    header = ["requests at", "errors", "refused", "late", "p99 of the admitted, ms", "good/s",
              "good/s in the burst", "mean rate: all, burst",
              *(f"effective {what}, %" for what in measures)]  # fmt: skip
    rows = []
    for name, rounds in trace["arms"].items():
        shares = [
            spread([100 * each[key] / each["offered"] for each in rounds], ".1f")
            for key in ("refused", "late")
        ]
        # A round in which nothing was answered has no mean rate.
        ran = (
            [each[key] for each in rounds if each[key] is not None]
            for key in ("rate", "rate_burst")
        )
        rates = (spread(each, ".1f") if each else "none" for each in ran)
        rows.append([name, sum(_of(rounds, "errors")), *(f"{share} %" for share in shares),
                     spread(_of(rounds, "p99_ms"), ".0f"), spread(_of(rounds, "goodput"), ".1f"),
                     spread(_of(rounds, "goodput_burst"), ".1f"), ", ".join(rates),
                     *(spread(_of(rounds, what), ".1f") for what in measures)])  # fmt: skip
    bounds = [spread(trace["oracle"][what], ".1f") for what in measures]
    rows.append(["oracle, a bound", *[""] * 7, *bounds])
    return markdown(header, rows)


def _conclusions(trace: dict[str, Any], measures: Sequence[str]) -> list[str]:
    arms = trace["arms"]
    auto = arms["auto"]
    lines = []
    for what in measures:
        of = spread(ratios(_of(auto, what), trace["oracle"][what]), ".3f")
        leads = ", ".join(
            f"{name} {points:+.1f} ({low:+.1f} to {high:+.1f})"
            for name, (points, (low, high)) in trace["ahead"][what].items()
        )
        lines.append(f"- Effective {what} of auto over the oracle's: {of}. Auto less others, in "
                     f"points: {leads}.")  # fmt: skip
    stock = _of(arms.get("rate 0", []), "goodput_burst")
    if stock and all(stock):
        burst = ratios(_of(auto, "goodput_burst"), stock)
        lines.append(f"- Goodput of auto over rate 0, in the burst: {spread(burst)}.")
    if trace["burst"]:
        back = ("never" if each is None else f"{each:.1f} s" for each in _of(auto, "back_after_s"))
        lines.append(f"- Back at rate 0 after the burst: {', '.join(back)}.")
    void = [
        f"{name}, {1 + number}" for name, rounds in arms.items()
        for number, each in enumerate(rounds) if each["void"]
    ]  # fmt: skip
    lines.append(f"- Void, since the client was late by more than {1000 * LATE:g} ms: "
                 f"{'; '.join(void) or 'none'}.")  # fmt: skip
    return lines


def _of(rounds: Sequence[dict[str, Any]], key: str) -> list[Any]:
    return [each[key] for each in rounds]
