"""The ladder that a recipe asks for, for one model."""

from collections.abc import Sequence
from typing import Any

from timm.models.vision_transformer import VisionTransformer

from adapters import Bank
from adapters.bank import learned_with
from adapters.ladder import LadderPart, digest, tuned_on_another
from tocom import TOME, Backbone, ConfigError, Ladder, cost
from tocom.ladder import even_ladder
from tocom.reduction import Method, method_of
from training.ladders.choice import LadderChoice, MethodLadder


def usual_ladder(
    method: Method, model: VisionTransformer, shares: Sequence[float], name: str
) -> Ladder:
    """Return a method's usual ladder with rungs that cost at most these shares of rung 0.

    A share that the method cannot reach gives no rung.
    """
    depth, patches = len(model.blocks), model.patch_embed.num_patches
    whole = cost(model).macs

    def macs(amounts: tuple[int, ...]) -> int:
        ladder = Ladder(name, method, ((0,) * depth, amounts), patches)
        return cost(model, 1, ladder=ladder).macs

    rungs = [(0,) * depth]
    for share in shares:
        low, high = 0.0, 1.0
        for _ in range(12):
            middle = (low + high) / 2
            amounts = method.amounts(middle, depth, patches)
            low, high = (low, middle) if macs(amounts) <= share * whole else (middle, high)
        amounts = method.amounts(high, depth, patches)
        if macs(amounts) <= share * whole and amounts != rungs[-1]:
            rungs.append(amounts)
    return Ladder(name, method, tuple(rungs), patches)


def chosen_ladder(choice: LadderChoice, model: VisionTransformer) -> Ladder:
    """Return the ladder of a recipe, which the model can run; None: the paper's.

    Raises:
        ReductionError: if the model cannot run it.
    """
    if isinstance(choice, LadderPart):
        ladder = choice.ladder()
    elif isinstance(choice, MethodLadder):
        method, name = method_of(choice.method, choice.options), choice.name or choice.method
        if choice.steps is not None:
            ladder = even_ladder(method, model, choice.steps, name)
        else:
            ladder = usual_ladder(method, model, choice.shares, name)
    else:
        ladder = TOME
    ladder.check(model)
    return ladder


def measured_ladder(
    choice: LadderChoice, backbone: Backbone, bank: Bank | None, sources: Sequence[int]
) -> Ladder:
    """Return the ladder that a model is measured on: the recipe's, else the bank's, else its own.

    Raises:
        ConfigError: if the bank is for another, or the model was tuned on another.
        ReductionError: if the model cannot run it, or lacks what its method learned.
    """
    if choice is not None:
        ladder = chosen_ladder(choice, backbone.model)
    else:
        ladder = bank.ladder if bank else backbone.ladder
    if bank and digest(bank.ladder) != digest(ladder):
        raise ConfigError(
            f"bank {bank.info.name!r} is for the ladder {bank.ladder.name!r}, not for "
            f"{ladder.name!r}"
        )
    ladder.check_learned(backbone.model, learned_with(backbone, bank))
    for source in sources:
        if (reason := tuned_on_another(backbone, source, ladder)) is not None:
            raise ConfigError(reason)
    return ladder


def measured_attention(
    choice: bool | None, backbone: Backbone, bank: Bank | None, sources: Sequence[int]
) -> bool:
    """Return whether attention is proportional: by the recipe, else the bank, else the model.

    Raises:
        ConfigError: if the bank is for the other, or the model was tuned with the other.
    """
    own = bank.info.proportional if bank else backbone.proportional
    if choice is None or choice == own:
        return own
    if bank:
        raise ConfigError(f"bank {bank.info.name!r} is for proportional={own}, not for {choice}")
    if backbone.source and max(sources):
        raise ConfigError(
            f"{backbone.name} was tuned at rate {backbone.source} with proportional={own}, not "
            f"with {choice}"
        )
    return choice


def described(ladder: Ladder) -> dict[str, Any]:
    """Return what results say of a ladder."""
    return {"name": ladder.name, "method": ladder.method.name, "digest": digest(ladder)}


def named(result: dict[str, Any]) -> str:
    """Return how tables name the ladder of a result; nothing for the paper's."""
    ladder = result.get("ladder") or {"name": TOME.name}
    return "" if ladder["name"] == TOME.name else f" on the ladder {ladder['name']}"
