"""Calibrations: the multiplier of a bank's deltas that was searched for one model.

A calibration is kept with the model, in the `config.json` of its folder or its `task.json`.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tocom import Backbone, BackboneError


@dataclass(frozen=True)
class Calibration:
    """The multiplier of a bank's deltas that was searched for a model.

    Attributes:
        bank_digest: the bank.
        source: rate that the model was tuned at.
        multiplier: one for all targets, or one for each.
        measure: what it is the best by: `kl` or `top1`.
        pictures: name and count of those that it was searched on.
    """

    bank_digest: str
    source: int
    multiplier: float | Mapping[int, float]
    measure: str
    pictures: Mapping[str, Any]

    @classmethod
    def of(cls, backbone: Backbone) -> "Calibration | None":
        """Read the calibration that a model came with; None if it has none.

        Raises:
            BackboneError: naming the model and the first fault.
        """
        said = backbone.calibration
        if said is None:
            return None
        if not isinstance(said, dict):
            raise BackboneError(f"{backbone.name}: calibration must be an object, got {said!r}")
        source = said.get("source")
        for key, fits, allowed in (
            ("bank_digest", isinstance(said.get("bank_digest"), str), "a digest"),
            ("source", type(source) is int and source >= 0, "a whole number from 0"),
            (
                "multiplier",
                _is_multiplier(said.get("multiplier")),
                "above 0, or so for each target",
            ),
            ("measure", said.get("measure") in ("kl", "top1"), "'kl' or 'top1'"),
            ("pictures", isinstance(said.get("pictures"), dict), "an object"),
        ):
            if not fits:
                raise BackboneError(
                    f"{backbone.name}: calibration.{key} must be {allowed}, got {said.get(key)!r}"
                )
        multiplier = said["multiplier"]
        if isinstance(multiplier, dict):
            multiplier = {int(rate): value for rate, value in multiplier.items()}
        return cls(
            said["bank_digest"], said["source"], multiplier, said["measure"], said["pictures"]
        )

    def fits(self, bank_digest: str, source: int) -> bool:
        """Return whether it was searched for this bank and this source rate."""
        return (self.bank_digest, self.source) == (bank_digest, source)

    def scale(self, target: int) -> float | None:
        """Return the multiplier at a target; None: it was not searched, the bank's own holds."""
        if isinstance(self.multiplier, Mapping):
            return self.multiplier.get(target)
        return self.multiplier


def _is_multiplier(value: Any) -> bool:
    if isinstance(value, dict):
        rates = all(rate.isascii() and rate.isdigit() for rate in value)
        return rates and all(_is_positive(one) for one in value.values())
    return _is_positive(value)


def _is_positive(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < math.inf
