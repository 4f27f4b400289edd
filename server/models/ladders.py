"""The ladders that a model is served on, as its settings name them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from adapters import Bank
from adapters.ladder import digest, read_ladder
from server.settings import ModelSettings
from tocom import TOME, Backbone, ConfigError, Ladder, ReductionError, ReductionWeights
from tocom.ladder import even_ladder
from tocom.reduction import METHODS, method_of

#: What stands for a ladder that is in no file of its own.
PAPERS, OF_BANK = "tome", "bank"


@dataclass(frozen=True)
class Opened:
    """A ladder and what was measured of it.

    Attributes:
        ladder: the ladder.
        evidence: what its file tells of it.
    """

    ladder: Ladder
    evidence: Mapping[str, Any] = field(default_factory=dict)


def open_ladders(
    settings: ModelSettings, backbone: Backbone, bank: Bank | None
) -> tuple[Opened, ...]:
    """Return the ladders of a model, the default one first.

    Where the settings name none it is the bank's; without a bank the one that the model was tuned
    on, which for most is the paper's.

    Raises:
        ConfigError: if one cannot be read, the backbone cannot have it, or two are alike.
    """
    own = backbone.ladder if bank is None else bank.ladder
    opened: list[Opened] = []
    for name in settings.ladders or (None,):
        try:
            new = Opened(own) if name is None else _open(name, backbone, bank)
            new.ladder.check(backbone.model)
        except ReductionError as error:
            raise ConfigError(f"model {settings.name!r}: {error}") from error
        for other in opened:
            if new.ladder.name == other.ladder.name:
                raise ConfigError(
                    f"model {settings.name!r}: two of its ladders are called {new.ladder.name!r}"
                )
            if are_same(new.ladder, other.ladder):
                raise ConfigError(
                    f"model {settings.name!r}: its ladders {other.ladder.name!r} and "
                    f"{new.ladder.name!r} are the same"
                )
        opened.append(new)
    return tuple(opened)


def _open(name: str, backbone: Backbone, bank: Bank | None) -> Opened:
    if name == PAPERS:
        return Opened(TOME)
    if name in METHODS and (steps := METHODS[name].steps) is not None:
        return Opened(even_ladder(method_of(name, {}), backbone.model, steps, name))
    if name != OF_BANK:
        info = read_ladder(name)
        return Opened(info.ladder(), info.evidence)
    if bank is None:
        raise ReductionError(f"the ladder {OF_BANK!r} is that of its bank, and it has none")
    return Opened(bank.ladder)


def check_learned(
    model: str, ladder: Ladder, backbone: Backbone, learned: ReductionWeights | None
) -> None:
    """Raise ConfigError if a model is to be served on a ladder for which it has no weights."""
    try:
        ladder.check_learned(backbone.model, learned)
    except ReductionError as error:
        raise ConfigError(f"model {model!r}: {error}") from error


def banks_of(
    model: str, tuned: Sequence[tuple[Ladder, int]], bank: Bank | None
) -> list[Bank | None]:
    """Return the bank that a model has on each of its ladders: a bank is for one of them.

    Args:
        model: its name.
        tuned: its ladders, each with the rate of it that it was tuned at; 0 if on another one.
        bank: the only one that it has.

    Raises:
        ConfigError: if the bank is for none of the ladders, or for another one than the model was
            tuned on.
    """
    if bank is None:
        return [None] * len(tuned)
    banks = [bank if are_same(ladder, bank.ladder) else None for ladder, _ in tuned]
    if not any(banks):
        there = ", ".join(ladder.name for ladder, _ in tuned)
        raise ConfigError(
            f"bank {bank.info.name!r} is for the ladder {bank.ladder.name!r}, on which the "
            f"model {model!r} is not served; its ladders are: {there}"
        )
    for (ladder, source), its in zip(tuned, banks, strict=True):
        if source and its is None:
            raise ConfigError(
                f"bank {bank.info.name!r} is for the ladder {bank.ladder.name!r}, and the model "
                f"{model!r} was tuned on another one, {ladder.name!r}, at rate {source}"
            )
    return banks


def are_same(one: Ladder, other: Ladder) -> bool:
    """Return whether two ladders do the same, whatever they are called."""
    return digest(one) == digest(other)
