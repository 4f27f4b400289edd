"""Write the pages of docs/reference from the code: settings, recipes and routes.

    make reference

What they say stands in the code alone: in the fields of the settings and recipes and in the
docstrings of the routes. A test fails while a page says something else.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from server.app import create_app
from server.settings import Settings
from training.program.kinds import KINDS

FOLDER = Path(__file__).parents[1] / "docs" / "reference"

#: A part of a JSON schema.
Schema = dict[str, Any]

#: What JSON's types are called, and the formats of text that are more than text.
TYPES = {
    "boolean": "true/false",
    "integer": "integer",
    "number": "number",
    "object": "table",
    "string": "text",
}
FORMATS = {"password": "secret", "path": "path"}

SETTINGS = """# Settings of the server

A setting is a key of the TOML file that `--config` or `TOCOM_CONFIG` names, or an environment
variable, which wins over the file. Lists and tables in a variable are written as JSON.
[The guide](../serving.md) says what they are good for. This page is made from the code by
`make reference`.
"""

RECIPES = """# Keys of the recipes

What each command of `tocom-train` takes: in its recipe, a TOML file, or behind it as `key=value`.
A key of a table within is written with a dot, as in `loop.steps=10`. The guides are
[training](../training.md), [fine-tuning](../finetuning.md) and [ladders](../ladders.md). This page
is made from the code by `make reference`.
"""

ROUTES = """# Routes of the server

What `/openapi.json` describes, a line each; [the HTTP API](../api.md) and
[the Open Inference Protocol](../open-inference-protocol.md) have examples. Besides there are `/`,
the page, and `/docs`, where each route can be tried. This page is made from the code by
`make reference`.
"""


def settings_page() -> str:
    """Return the page of all settings of the server."""
    tables = Tables([Settings])
    prefix = str(Settings.model_config.get("env_prefix", ""))
    rows = [
        (f"`{name}`", f"`{prefix}{name.upper()}`", *rest) for name, *rest in tables.rows(Settings)
    ]
    parts = [SETTINGS, _table(("setting", "variable", "type", "default", "meaning"), rows)]
    return _page([*parts, *tables.sections()])


def recipes_page() -> str:
    """Return the page of all keys of all recipes."""
    tables = Tables([*KINDS.values()])
    parts = [RECIPES]
    for command, recipe in KINDS.items():
        what = _sentence(recipe.__doc__).partition(": ")[2]
        parts += [f"## tocom-train {command}", what[:1].upper() + what[1:], tables.keys(recipe)]
    return _page([*parts, *tables.sections()])


def routes_page() -> str:
    """Return the page of all routes."""
    rows = []
    for path, methods in create_app(Settings()).openapi()["paths"].items():
        for method, route in methods.items():
            query = [each["name"] for each in route.get("parameters", ()) if each["in"] == "query"]
            parameters = ", ".join(f"`{name}`" for name in query)
            route_of = f"`{method.upper()} {path}`"
            rows.append((route_of, _sentence(route.get("description")), parameters))
    return _page([ROUTES, _table(("route", "what it does", "parameters"), rows)])


PAGES: dict[str, Callable[[], str]] = {
    "settings": settings_page,
    "recipes": recipes_page,
    "routes": routes_page,
}


class Tables:
    """Models of pydantic and the tables within them, as tables of Markdown."""

    def __init__(self, models: list[type[BaseModel]]) -> None:
        refs, schema = models_json_schema([(model, "validation") for model in models])
        self._schemas: dict[str, Schema] = schema["$defs"]
        self._names = {model: _name(ref) for (model, _), ref in refs.items()}

    def rows(self, model: type[BaseModel]) -> Iterator[tuple[str, str, str, str]]:
        """Yield name, type, default and meaning of each field."""
        yield from self._rows(self._names[model])

    def keys(self, model: type[BaseModel]) -> str:
        """Return the table of a model."""
        return self._keys(self._names[model])

    def sections(self) -> Iterator[str]:
        """Yield heading, meaning and table of each table that is within another one."""
        for name in sorted(self._schemas.keys() - {*self._names.values()}, key=_heading):
            yield f"## {_heading(name)}"
            yield _sentence(self._schemas[name].get("description"))
            if self._schemas[name].get("properties"):
                yield self._keys(name)

    def _keys(self, name: str) -> str:
        rows = [(f"`{key}`", *rest) for key, *rest in self._rows(name)]
        return _table(("key", "type", "default", "meaning"), rows)

    def _rows(self, name: str) -> Iterator[tuple[str, str, str, str]]:
        schema = self._schemas[name]
        for key, field in schema.get("properties", {}).items():
            default = "required"
            if key not in schema.get("required", ()):
                default = self._default(key, field)
            meaning = field.get("description")
            if meaning is None and "$ref" in field:
                meaning = _sentence(self._schemas[_name(field)].get("description"))
            yield key, self._type(field), default, meaning or ""

    def _type(self, field: Schema) -> str:
        """Say in words what a value may be."""
        if "$ref" in field:
            heading = _heading(_name(field))
            return f"[{heading}](#{heading.lower()})"
        for key in ("anyOf", "oneOf", "allOf"):
            if key in field:
                parts = [self._type(each) for each in field[key] if each.get("type") != "null"]
                if "number" in parts:  # which an integer is
                    parts = [part for part in parts if part != "integer"]
                return _one_of(parts)
        if "enum" in field or "const" in field:
            return _one_of([f"`{value}`" for value in field.get("enum", [field.get("const")])])
        if field.get("type") == "array":
            if "prefixItems" in field:
                return "list of " + ", ".join(map(self._type, field["prefixItems"]))
            return f"list of {self._type(field.get('items', {}))}{_bounds(field)}"
        if "type" not in field:
            return "anything"
        if isinstance(values := field.get("additionalProperties"), dict):
            return f"table of {self._type(values)}"
        said = FORMATS.get(field.get("format", ""), TYPES[field["type"]])
        if "pattern" in field:
            said += f" like `{field['pattern']}`"
        return said + _bounds(field)

    def _default(self, key: str, field: Schema) -> str:
        """Say what holds if a key is not given."""
        value = field.get("default")
        if value is None:
            return "none"
        if "$ref" in field and isinstance(value, dict):
            return "its own" if self._is_own(value, _name(field)) else f"`{json.dumps(value)}`"
        if key.endswith("_bytes") and value and value % 2**20 == 0:
            return f"`{value}` ({value // 2**20} MiB)"
        if isinstance(value, str):
            return f"`{value}`"
        return f"`{json.dumps(_said(value), ensure_ascii=False)}`"

    def _is_own(self, value: Schema, name: str) -> bool:
        """Tell whether a table's value is what its keys are by themselves."""
        fields = self._schemas[name].get("properties", {})
        return all(fields.get(key, {}).get("default") == each for key, each in value.items())


def _said(value: Any) -> Any:
    """Leave out of a default what it does not say."""
    if isinstance(value, list):
        return [_said(each) for each in value]
    if isinstance(value, dict):
        return {key: each for key, each in value.items() if each not in (None, [], {})}
    return value


def _one_of(parts: list[str]) -> str:
    *others, last = dict.fromkeys(parts)  # each once
    return f"{', '.join(others)} or {last}" if others else last


def _bounds(field: Schema) -> str:
    low, high = field.get("minimum"), field.get("maximum")
    if low is not None and high is not None:
        return f" ({low} to {high})"
    signs = {
        "minimum": "≥",
        "exclusiveMinimum": ">",
        "maximum": "≤",
        "exclusiveMaximum": "<",
        "minItems": "at least",
        "maxItems": "at most",
    }
    said = [f"{sign} {field[key]}" for key, sign in signs.items() if key in field]
    return f" ({', '.join(said)})" if said else ""


def _name(ref: Schema) -> str:
    return str(ref["$ref"]).rpartition("/")[2]


def _heading(name: str) -> str:
    return name.removesuffix("Config").removesuffix("Settings")


def _sentence(text: str | None) -> str:
    """Return the first paragraph of a docstring as one line."""
    return " ".join((text or "").split("\n\n")[0].split())


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |" for line in lines
    )


def _page(parts: list[str]) -> str:
    return "\n\n".join(part.strip() for part in parts if part) + "\n"


def main() -> None:
    """Write all pages."""
    FOLDER.mkdir(exist_ok=True)
    for name, page in PAGES.items():
        (FOLDER / f"{name}.md").write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
