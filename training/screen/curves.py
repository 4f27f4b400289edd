"""The curves of a run: its loss, and what was measured on unseen pictures."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from training.screen.progress import say

_FIGURE = re.compile(r"unseen_(kl|error|miou)_(\d+)(?:_(plain|bank))?")
_NAMES = {"kl": "KL", "error": "error", "miou": "mIoU"}


@dataclass(frozen=True)
class Watched:
    """What was measured on unseen pictures after a step.

    Attributes:
        step: after which.
        name: of the measure: KL (nats), or error for a model without a head; mIoU (percent).
        now: of what is trained, by rate.
        plain: of the backbone as it is, by rate; empty where that is not measured.
    """

    step: int
    name: str
    now: dict[int, float]
    plain: dict[int, float]

    @classmethod
    def of(cls, line: dict[str, Any]) -> "Watched | None":
        """Read a line of `metrics.jsonl`; None if nothing was measured then."""
        name, now, plain = "", dict[int, float](), dict[int, float]()
        for key, value in line.items():
            if found := _FIGURE.fullmatch(key):
                name = _NAMES[found[1]]
                (plain if found[3] == "plain" else now)[int(found[2])] = value
        return cls(line["step"], name, now, plain) if now else None

    def __str__(self) -> str:
        """Return the figures in a line."""
        rates = [
            f"{rate}: {figure(value)}"
            + (f" (plain {figure(self.plain[rate])})" if rate in self.plain else "")
            for rate, value in self.now.items()
        ]
        return f"unseen {self.name} at rate {', '.join(rates)}"


@dataclass
class Curves:
    """The figures of a run so far.

    Attributes:
        losses: (step, loss) of each step.
        watched: what was measured now and then.
        learning_rate: of the last step.
    """

    losses: list[tuple[int, float]] = field(default_factory=list)
    watched: list[Watched] = field(default_factory=list)
    learning_rate: float = 0.0
    _told: int = 0  # steps whose loss was told

    @classmethod
    def of(cls, lines: Sequence[dict[str, Any]]) -> "Curves":
        """Return those of the lines of `metrics.jsonl`."""
        curves = cls()
        for line in lines:
            curves.add(line)
        curves._told = len(curves.losses)
        return curves

    def add(self, line: dict[str, Any]) -> None:
        """Add a step's line."""
        self.losses.append((line["step"], line["loss"]))
        self.learning_rate = line["learning_rate"]
        if (found := Watched.of(line)) is not None:
            self.watched.append(found)

    def tell(self, steps: int, left: str) -> None:
        """Say in a line how the run is doing.

        Args:
            steps: of the whole run.
            left: how long the rest takes; may be empty.
        """
        step = self.losses[-1][0]
        parts = [f"step {step:,} of {steps:,}"]
        if self.watched and self.watched[-1].step == step:
            parts.append(str(self.watched[-1]))
        parts.append(f"loss {figure(mean_loss(self.losses[self._told :]))}")
        parts.append(f"learning rate {self.learning_rate:.2e}")
        say("; ".join([*parts, *([left] if left else [])]))
        self._told = len(self.losses)


def figure(value: float) -> str:
    """Return a loss or a divergence as it is shown: small ones matter as much as large ones."""
    return f"{value:#.3g}"


def mean_loss(losses: Sequence[tuple[int, float]]) -> float:
    """Return the mean of some steps."""
    return sum(loss for _, loss in losses) / len(losses)
