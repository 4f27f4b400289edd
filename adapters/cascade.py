"""Cascades: a picture is answered at a cheap rung, and again at a dearer one if that is not sure.

How sure an answer must be is a threshold on its margin, chosen on unlabelled pictures so that the
last answers agree with rung 0's as often as asked, or cost no more than asked on average. What was
chosen is `cascade.json`, in the folder of the model that it is for. Nothing here runs a model.
"""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Final, Literal

from pydantic import Field, model_validator
from torch import Tensor

from adapters.durable import replace_file
from adapters.ladder import digest
from adapters.schema import Notes, Strict, read_part
from tocom import ConfigError, Ladder

FILE: Final = "cascade.json"

Share = Annotated[float, Field(gt=0, le=1)]


class CascadePoint(Strict):
    """One way to run pictures: which rungs, and how sure an answer must be to be the last."""

    rates: tuple[Annotated[int, Field(ge=0)], ...] = Field(
        min_length=1, description="rungs one after the other, the cheapest first"
    )
    thresholds: tuple[Annotated[float, Field(ge=0, le=1)], ...] = Field(
        description="least margin of an answer that stands, at each of the rates but the last"
    )
    agreement: Share = Field(
        description="share of pictures that are answered as at rung 0, less what chance may have "
        "added to it"
    )
    share: Annotated[float, Field(gt=0)] = Field(
        description="mean multiply-adds of a picture, compared to rung 0"
    )

    @model_validator(mode="after")
    def _ends(self) -> "CascadePoint":
        if len(self.thresholds) != len(self.rates) - 1:
            raise ValueError(
                f"{len(self.rates)} rates have {len(self.rates) - 1} thresholds between them, "
                f"got {len(self.thresholds)}"
            )
        if any(dear >= cheap for cheap, dear in itertools.pairwise(self.rates)):
            raise ValueError(
                f"the rates must fall, each run dearer than the last, got {self.rates}"
            )
        return self


class Cascade(Strict):
    """Everything in `cascade.json`."""

    format_version: Literal[1] = 1
    weights_digest: str = Field(description="of the model that it was calibrated for")
    task_digest: str = Field("", description="of its task, if it has one")
    bank_digest: str | None = Field(description="of the bank that it ran with; null: without one")
    ladder_digest: str = Field(description="of what its rates mean")
    source: int = Field(ge=0, description="rate that the model was tuned at")
    points: Annotated[tuple[CascadePoint, ...], Field(min_length=1, max_length=1000)] = Field(
        description="each agrees more often than the one before it, and costs more"
    )
    pictures: Notes = Field({}, description="those that it was calibrated on")

    @model_validator(mode="after")
    def _rising(self) -> "Cascade":
        for one, other in itertools.pairwise(self.points):
            if one.agreement >= other.agreement or one.share >= other.share:
                raise ValueError("its points must rise, both in agreement and in share")
        return self

    def misfit(
        self,
        weights_digest: str,
        task_digest: str,
        bank_digest: str | None,
        ladder: Ladder,
        source: int,
    ) -> str | None:
        """Return what it is for that is not so; None: it is for just this."""
        for what, own, other in (
            ("weights", self.weights_digest, weights_digest),
            ("task", self.task_digest, task_digest),
            ("bank", self.bank_digest, bank_digest),
            ("ladder", self.ladder_digest, digest(ladder)),
        ):
            if own != other:
                return f"{what} {_short(own)}, served is {_short(other)}"
        if self.source != source:
            return f"source rate {self.source}, served is {source}"
        return None

    def agreeing(self, agreement: float) -> CascadePoint | None:
        """Return the cheapest point that agrees so often; None: none does."""
        return next((point for point in self.points if point.agreement >= agreement), None)

    def within(self, budget: float) -> CascadePoint | None:
        """Return the best point whose mean share is no larger; None: there is none."""
        return next((each for each in reversed(self.points) if each.share <= budget), None)


def margins(logits: Tensor) -> Tensor:
    """Return how sure answers are: by how much the most likely class leads.

    Args:
        logits: [B, C].

    Returns:
        [B] difference of the two highest probabilities, in 0..1; 1 where there is one class only.
    """
    if logits.shape[-1] == 1:
        return logits.new_ones(logits.shape[:-1])
    best = logits.float().softmax(dim=-1).topk(2, dim=-1).values
    return best[..., 0] - best[..., 1]


def read_cascade(path: str | Path) -> Cascade:
    """Read a `cascade.json`, or that of a folder.

    Raises:
        ConfigError: if it cannot be read or is malformed; the message names the fault.
    """
    path = Path(path)
    return read_part(Cascade, path / FILE if path.is_dir() else path, "cascade", ConfigError)


def write_cascade(cascade: Cascade, path: Path) -> Path:
    """Write a `cascade.json`: one that is there is replaced."""
    replace_file(path, cascade.model_dump_json(indent=1) + "\n")
    return path


def frontier(points: Sequence[CascadePoint]) -> tuple[CascadePoint, ...]:
    """Return the points than which no other agrees as often for as little, the cheapest first."""
    kept: list[CascadePoint] = []
    for point in sorted(points, key=lambda each: (each.share, -each.agreement)):
        if not kept or point.agreement > kept[-1].agreement:
            kept.append(point)
    return tuple(kept)


def _short(digest: str | None) -> str:
    return digest[:12] if digest else "none"
