"""What all recipes have in common."""

from collections.abc import Sequence
from contextlib import suppress
from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, ValidationError


class Recipe(BaseModel):
    """Part of a recipe: unknown keys are refused, values never change."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def table_of(annotation: Any) -> type[Recipe] | None:
    """Return the table that a key of this type holds, or a list of; None: it holds values."""
    if isinstance(annotation, type) and issubclass(annotation, Recipe):
        return annotation
    found = (table_of(each) for each in get_args(annotation))
    return next((each for each in found if each is not None), None)


def table_at(kind: type[Recipe], path: Sequence[Any]) -> type[Recipe] | None:
    """Return the table at a place in a recipe; None: there is none.

    Args:
        kind: the recipe.
        path: keys and numbers of entries, as pydantic tells where a fault is.
    """
    table: type[Recipe] | None = kind
    for key in path:
        if isinstance(key, int):
            continue
        if table is None or key not in table.model_fields:
            return None
        table = table_of(table.model_fields[key].annotation)
    return table


def with_defaults(said: dict[str, Any], kind: type[Recipe]) -> dict[str, Any]:
    """Return a written recipe with the defaults of keys that the version that wrote it lacked.

    Args:
        said: the recipe; what is none of this kind is returned as it is.
        kind: the recipe's.
    """
    with suppress(ValidationError):
        return kind.model_validate(said).model_dump(mode="json")
    return said


def differing(then: Any, now: Any, key: str = "") -> dict[str, tuple[Any, Any]]:
    """Return the keys of two written recipes whose values differ, in full, with both values."""
    if not (isinstance(then, dict) and isinstance(now, dict)):
        return {} if then == now else {key: (then, now)}
    found: dict[str, tuple[Any, Any]] = {}
    for each in {**now, **then}:
        inner = f"{key}.{each}" if key else each
        found |= differing(then.get(each), now.get(each), inner)
    return found
