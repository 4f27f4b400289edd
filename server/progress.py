"""How far a server that starts has come."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias


@dataclass(frozen=True)
class Progress:
    """What a server does before it can answer.

    Attributes:
        model: that is being loaded or warmed up; None: none yet, modules are being imported.
        ladder: of it, on which rates are made warm; None: it is still being loaded.
        warm: rates of the ladder that are warm.
        rates: that will be.
    """

    model: str | None = None
    ladder: str | None = None
    warm: int = 0
    rates: int = 0

    def __str__(self) -> str:
        if self.model is None:
            return "modules are being imported"
        if self.ladder is None:
            return f"model {self.model} is being loaded"
        name = self.model if self.ladder == "tome" else f"{self.model} on {self.ladder}"
        return f"model {name}: {self.warm} of {self.rates} rates are warm"


#: Is told of each step, from any thread.
Tell: TypeAlias = Callable[[Progress], None]


def tell_nobody(progress: Progress) -> None:
    """Do nothing."""
