"""Which ladder a recipe is for: a key of many recipes."""

from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BeforeValidator, Field

from adapters import open_bank
from adapters.ladder import Embedded, LadderPart, read_ladder
from tocom.reduction import METHODS
from training.recipe import Recipe

Shares = tuple[Annotated[float, Field(gt=0, lt=1)], ...]
#: Multiply-adds of the rungs of a method's usual ladder.
SHARES: Shares = (0.87, 0.74, 0.62, 0.5)


class MethodLadder(Recipe):
    """A method on its usual ladder, which is made for the backbone."""

    method: str = Field(description="name of a method of reduction, such as `tome`")
    options: dict[str, bool | int | float | str] = Field({}, description="of the method")
    shares: Shares = Field(
        SHARES,
        min_length=1,
        description="multiply-adds of the rungs, as shares of the stock model's",
    )
    steps: int | None = Field(
        None,
        gt=0,
        description="in place of shares: so many rungs, of evenly rising strength up to the most "
        "that the method can do",
    )
    name: str | None = Field(None, description="of the ladder; default: the method's")


def _read(value: Any) -> Any:
    """Read a file: a run keeps the ladder that it was begun with, whatever becomes of the file."""
    if not isinstance(value, str) or value == "tome":
        return value
    if value in METHODS:
        return {"method": value, "steps": METHODS[value].steps}
    if value.startswith("bundled:") or (Path(value) / "bank.json").exists():
        return open_bank(value).info.ladder or "tome"
    return read_ladder(value).model_dump(exclude={"format_version", "evidence"})


#: `tome`, the paper's; a `ladder.json` or a folder that holds one; a bank, for its ladder; the name
#: of a method, or a table of one, for its usual ladder. None: as the recipe says.
LadderChoice: TypeAlias = Annotated[
    Literal["tome"] | Embedded | MethodLadder | None,
    BeforeValidator(_read, json_schema_input_type=str | LadderPart | MethodLadder | None),
]
