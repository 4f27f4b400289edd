"""Reading recipes: TOML files or presets by name, changed by `key=value` overrides."""

import sys
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from tocom import ConfigError
from training.recipe import Recipe

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
    values = _read_toml(_find(recipe))
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise ConfigError(f"an override is key=value, got {override!r}")
        _set(values, key.strip().split("."), _toml_value(text.strip()))
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        lines = [
            f"  {'.'.join(str(part) for part in fault['loc'])}: {fault['msg']}"
            + (f", got {fault['input']!r}" if isinstance(fault["input"], str | int | float) else "")
            for fault in error.errors()
        ]
        raise ConfigError("\n".join([f"{recipe} is no valid recipe:", *lines])) from None


def presets() -> list[str]:
    """Return the names of the recipes that come with this package."""
    folder = resources.files("training") / "recipes"
    return sorted(Path(item.name).stem for item in folder.iterdir() if item.name.endswith(".toml"))


def _find(recipe: str) -> Path:
    if Path(recipe).is_file():
        return Path(recipe)
    if recipe in presets():
        return Path(str(resources.files("training") / "recipes" / f"{recipe}.toml"))
    raise ConfigError(f"there is no recipe file {recipe!r}; presets: {', '.join(presets())}")


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error


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
