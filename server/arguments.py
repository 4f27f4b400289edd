"""The arguments of `tocom-serve`, made of its settings. Needs no torch, which takes seconds."""

import argparse
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic.fields import FieldInfo

from server.settings import SECRET, Settings, load_settings
from tocom import ConfigError
from tocom.command_line import Parser, Version
from tocom.completion import Completion

#: What may be said of a model besides its name and backbone.
MODEL_KEYS = ("task", "bank", "architecture", "source", "ladder", "cascade")

#: Ends the names of what is repeated after a command: it is added to what was before that.
AFTER = "_after"

DESCRIPTION = """\
Serve Vision Transformers at any token-merging rate. Without arguments, serve the bundled model.
"""
EPILOG = """\
Each setting may also be a TOCOM_... variable (TOCOM_PORT=9000) or a line of the TOML file of
--config (port = 9000). Arguments win over variables, and variables over the file. The secrets
admin_key and api_keys are never arguments, because others on this machine can see those.
"""


def parser() -> Parser:
    """Return what reads the arguments; `command` says what they ask for."""
    whole = Parser(
        prog="tocom-serve",
        usage="%(prog)s [--SETTING VALUE ...] [COMMAND ...]",
        argument_default=argparse.SUPPRESS,
        description=DESCRIPTION,
        epilog=EPILOG,
    )
    whole.add_argument("--version", action=Version)
    whole.add_argument("--completion", action=Completion)
    whole.set_defaults(command="serve")
    commands = whole.add_subparsers(prog="tocom-serve", title="without a server", metavar="COMMAND")
    _add_settings(whole)

    # What is not given is absent: a command must not overwrite what was given before it.
    command = commands.add_parser(
        "check",
        usage="%(prog)s [--SETTING VALUE ...]",
        argument_default=argparse.SUPPRESS,
        help="load all models and run each once",
    )
    _add_settings(command, AFTER)
    command.set_defaults(command="check")

    command = commands.add_parser(
        "classify",
        usage="%(prog)s PHOTO [PHOTO ...] [--rate RATE] [--top-k K] [--json] [--SETTING VALUE ...]",
        argument_default=argparse.SUPPRESS,
        conflict_handler="resolve",
        help="classify photographs",
    )
    _add_settings(command, AFTER)
    command.add_argument(
        "photos", nargs="+", type=Path, metavar="PHOTO", help="a JPEG, PNG or WebP file"
    )
    command.add_argument(
        "--rate",
        default="0",
        help="0: the stock model; higher is cheaper (default: 0)",
    )
    command.add_argument(
        "--top-k", type=int, dest="predictions", metavar="K", help="predictions for each photo"
    )
    command.add_argument("--json", action="store_true", help="print a line of JSON for each photo")
    command.set_defaults(command="classify", json=False, predictions=None)
    return whole


def settings(parsed: argparse.Namespace) -> Settings:
    """Return the settings that arguments, variables and the file say.

    Raises:
        ConfigError: naming what is wrong.
    """
    said = vars(parsed)
    given = {name: said[name] for name in ("config", *Settings.model_fields) if name in said}
    for name in Settings.model_fields:
        if more := said.get(name + AFTER):
            given[name] = [*given.get(name, ()), *more]
    if "models" in given:
        given["models"] = [_model(text) for text in given["models"]]
    return load_settings(**given)


def _add_settings(command: argparse.ArgumentParser, after: str = "") -> None:
    """Add all settings; `after` follows the names under which what is repeated is kept."""
    group = command.add_argument_group("settings")
    group.add_argument("--config", metavar="FILE", help="TOML file with settings")
    group.add_argument(
        "--model",
        dest=f"models{after}",
        action="append",
        metavar="NAME=BACKBONE[,KEY=VALUE...]",
        help="model to serve instead of the bundled one; may be repeated; keys: "
        f"{', '.join(MODEL_KEYS)}, of which ladder may be repeated; "
        "e.g. imagenet=timm/deit_tiny_patch16_224.fb_in1k,bank=bundled:deit_tiny_bank",
    )
    for name, field in Settings.model_fields.items():
        if name != "models" and name not in SECRET:
            option, kind = f"--{name.replace('_', '-')}", _values(name, field, after)
            group.add_argument(option, help=_help(field), **kind)


def _values(name: str, field: FieldInfo, after: str) -> dict[str, Any]:
    """Return how a setting is written; what its value means is the settings' matter."""
    kinds = [each for each in get_args(field.annotation) if each is not type(None)]
    if get_origin(field.annotation) is Literal:
        return {"metavar": "|".join(kinds)}
    if get_origin(field.annotation) is tuple:
        return {"metavar": "VALUE", "action": "append", "dest": f"{name}{after}"}
    kind = kinds[0] if kinds else field.annotation
    if kind is bool:
        return {"action": argparse.BooleanOptionalAction}
    words: dict[Any, str] = {int: "N", float: "X", Path: "PATH"}
    return {"metavar": words.get(kind, "VALUE")}


def _help(field: FieldInfo) -> str:
    text = str(field.description)
    if isinstance(field.default, tuple):
        text += "; may be repeated"
    elif "default:" not in text:
        default = str(field.default).lower() if isinstance(field.default, bool) else field.default
        text += f" (default: {default})"
    return text.replace("%", "%%")


def _model(text: str) -> dict[str, str | list[str]]:
    """Read `NAME=BACKBONE[,KEY=VALUE...]`; what the values mean is the settings' matter."""
    first, *rest = text.split(",")
    name, _, backbone = first.partition("=")
    model: dict[str, str | list[str]] = {"name": name, "backbone": backbone}
    ladders = []
    for part in rest:
        key, _, value = part.partition("=")
        if key not in MODEL_KEYS or not value:
            raise ConfigError(
                f"--model {text}: expected KEY=VALUE with one of {', '.join(MODEL_KEYS)}, "
                f"got {part!r}"
            )
        if key in model:
            raise ConfigError(
                f"--model {text}: only ladder may be repeated, got {part!r} after {model[key]!r}"
            )
        if key == "ladder":
            ladders.append(value)
        else:
            model[key] = value
    if ladders:
        model["ladders"] = ladders
    if not name or not backbone:
        raise ConfigError(f"--model {text}: expected NAME=BACKBONE")
    return model
