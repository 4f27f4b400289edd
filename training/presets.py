"""Reading recipes: TOML files or presets by name, changed by `key=value` overrides."""

import re
import sys
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from tocom import ConfigError
from tocom.wording import did_you_mean, value_fault
from training.recipe import Recipe, table_at

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

R = TypeVar("R", bound=Recipe)


def read_recipe(kind: type[R], recipe: str, overrides: Sequence[str] = ()) -> R:
    """Read a recipe and apply `key=value` overrides.

    Args:
        kind: what the recipe describes.
        recipe: a TOML file, or the name of a preset in `training/recipes`.
        overrides: such as `loop.steps=10`; the value is TOML, a bare word is a string.

    Raises:
        ConfigError: naming the key, what came and what is allowed.
    """
    values = read_toml(find_recipe(recipe))
    for key, value in parse_overrides(overrides):
        _set(values, key.split("."), value)
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        lines = dict.fromkeys(f"  {_fault(kind, fault)}" for fault in error.errors())
        raise ConfigError("\n".join([f"{recipe} is no valid recipe:", *lines])) from None


def parse_overrides(overrides: Sequence[str]) -> list[tuple[str, Any]]:
    """Read `key=value` overrides.

    Raises:
        ConfigError: if one is something else.
    """
    parsed = []
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"an override is key=value, got {override!r}")
        parsed.append((key.strip(), _toml_value(text.strip())))
    return parsed


def presets() -> list[str]:
    """Return the names of the recipes that come with this package."""
    folder = resources.files("training") / "recipes"
    return sorted(Path(item.name).stem for item in folder.iterdir() if item.name.endswith(".toml"))


def command_of(preset: str) -> str:
    """Return the command that a preset is for, as its first lines show it."""
    text = _preset(preset).read_text(encoding="utf-8")
    found = re.search(rf"^# .*(?:tocom-train|training\.cli) ([\w-]+) {preset} ", text, re.MULTILINE)
    assert found is not None
    return found[1]


def summary_of(preset: str) -> str:
    """Return what a preset is, in a line: its first one."""
    return _preset(preset).read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ")


def _preset(name: str) -> Path:
    return Path(str(resources.files("training") / "recipes" / f"{name}.toml"))


def find_recipe(recipe: str) -> Path:
    """Return the file of a recipe: what is at its path, or the preset of that name.

    Raises:
        ConfigError: if there is none.
    """
    if Path(recipe).is_file():
        return Path(recipe)
    if recipe in presets():
        return _preset(recipe)
    raise ConfigError(
        f"there is no recipe file and no preset {recipe!r}{did_you_mean(recipe, presets())} "
        "(tocom-train presets lists them)"
    )


def read_toml(path: Path) -> dict[str, Any]:
    """Return what a recipe file says.

    Raises:
        ConfigError: if it cannot be read.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error


def _fault(kind: type[Recipe], fault: Any) -> str:
    """Say in a line what is wrong with a recipe."""
    where = ".".join(str(part) for part in fault["loc"])
    *path, last = fault["loc"] or ("",)
    table = table_at(kind, path)
    fields = table.model_fields if table else {}
    if fault["type"] == "extra_forbidden":
        place = f" in {'.'.join(map(str, path))}" if path else ""
        there = f"; there are: {', '.join(fields)}" if fields else ""
        return f"there is no key {last!r}{place}{did_you_mean(str(last), fields) or there}"
    if fault["type"] == "missing":
        told = fields[str(last)].description if str(last) in fields else None
        return f"{where} is missing" + (f": {told}" if told else "")
    plain = isinstance(fault["input"], str | int | float)
    got = f", got {fault['input']!r}" if plain else ""
    if fault["type"] == "value_error":
        return (f"{where}: " if where else "") + f"{fault['ctx']['error']}{got}"
    return f"{where} {value_fault(fault)}{got}"


def _toml_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _set(values: dict[str, Any], keys: list[str], value: Any) -> None:
    for key in keys[:-1]:
        values = values.setdefault(key, {})
        if not isinstance(values, dict):
            raise ConfigError(f"{key} is a value, not a table; it cannot hold {keys[-1]}")
    values[keys[-1]] = value
