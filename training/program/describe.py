"""What `tocom-train presets` tells: which there are, and all keys of one."""

import json
import types
from collections.abc import Iterator
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from training.presets import command_of, find_recipe, read_toml
from training.program.kinds import KINDS
from training.recipe import Recipe

_WORDS = {bool: "true or false", int: "whole number", float: "number", str: "text"}
_LIMITS = {"gt": "more than", "ge": "at least", "lt": "less than", "le": "at most"}


def described(preset: str) -> str:
    """Return a preset and every key that its command takes.

    Raises:
        ConfigError: if there is no such preset.
    """
    path = find_recipe(preset)
    command = command_of(preset)
    given = read_toml(path)
    heading = f"Every key of {command}. What a recipe leaves out has its default."
    keys = "\n".join(_lines(KINDS[command], given))
    return f"{path.read_text(encoding='utf-8').rstrip()}\n\n\n{heading}\n\n{keys}"


def _lines(table: type[Recipe], given: Any, prefix: str = "") -> Iterator[str]:
    """Yield what there is to say of a table's keys: two lines for each."""
    for name, field in table.model_fields.items():
        key = prefix + name
        here = given.get(name) if isinstance(given, dict) else None
        inner, entries = _table(field.annotation)
        if inner is None or entries:
            value = "" if here is None else f" = {_toml(here)}"
            yield f"{key}{value}   ({_type(field.annotation, field)}; {_default(field)})"
            if field.description:
                yield f"    {field.description}"
        if inner is not None:
            yield from _lines(inner, None if entries else here, f"{key}{'[]' * entries}.")


def _table(annotation: Any) -> tuple[type[Recipe] | None, bool]:
    """Return the table that a key holds, and whether it is a list of such; None: it holds values.

    A key that takes a table or something else counts as a value.
    """
    if isinstance(annotation, type) and issubclass(annotation, Recipe):
        return annotation, False
    arguments = [each for each in get_args(annotation) if each not in (type(None), ...)]
    if len(arguments) != 1:
        return None, False
    inner, _ = _table(arguments[0])
    return inner, get_origin(annotation) is tuple


def _type(annotation: Any, field: FieldInfo | None = None) -> str:
    """Return the words for a type, and the limits that its field has."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        words = " or ".join(map(str, arguments))
    elif origin in (Union, types.UnionType):
        kinds = [_type(each) for each in arguments if each is not type(None)]
        words = " or ".join(dict.fromkeys(kinds))
    elif origin is tuple:
        kinds = list(dict.fromkeys(_type(each) for each in arguments if each is not ...))
        words = f"list of: {' and '.join(kinds)}"
    elif origin is not None and origin is not dict:  # Annotated
        words = _type(arguments[0])
    elif (isinstance(annotation, type) and issubclass(annotation, BaseModel)) or origin is dict:
        words = "table"
    else:
        words = _WORDS.get(annotation, "value")
    limits = [
        f", {text} {limit}"
        for rule in (field.metadata if field else ())
        for name, text in _LIMITS.items()
        if (limit := getattr(rule, name, None)) is not None
    ]
    return words + "".join(limits)


def _default(field: FieldInfo) -> str:
    if field.default is PydanticUndefined:
        return "must be given"
    if field.default is None:
        return "not set by default"
    return f"default {_toml(field.default)}"


def _toml(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
