"""`tocom-train`: distil banks, fine-tune models, measure both, keep what was measured.

Reads the arguments; what they ask for is imported after that, for which torch takes seconds.
"""

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from tocom import ConfigError, TocomError
from tocom.allocator import keep_freed_memory
from tocom.command_line import Parser, Version
from tocom.completion import Completion
from tocom.wording import did_you_mean

#: The commands that take a recipe, and what they do.
COMMANDS = {
    "search": "search a ladder of cheaper forwards for a backbone; needs no labels",
    "distill": "make a bank of plug-ins for a backbone; needs no labels",
    "elastic": "tune all weights of a backbone for all rates at once; needs no labels",
    "finetune": "tune a backbone on a labelled task",
    "prune": "make a model smaller and faster by taking out channels",
    "segment": "train a model that gives a class to every pixel; needs such labels",
    "evaluate": "measure a model at every rate, with and without a bank",
    "evaluate-segment": "measure a segmenter at every rate, with and without a bank",
    "compare": "measure methods, ladders and banks side by side",
    "analyse": "compare which tokens methods keep or merge, and what that changes",
    "calibrate": "find the best multiplier of a bank's deltas for a model; needs no labels",
    "calibrate-cascade": "choose how sure a cheap answer must be to be final; needs no labels",
    "vtab": "tune on many tasks at many rates, and put all results in one table",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program and return its exit code: 0, 2 for a mistake, 130 if it was stopped.

    What the system refuses, as a folder that cannot be written, is a mistake too.
    """
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    # argparse takes no more positional arguments after an option; key=value may stand anywhere.
    if rest and (not hasattr(arguments, "overrides") or any(w.startswith("-") for w in rest)):
        parser.error(f"unknown arguments: {' '.join(rest)}")
    if rest:
        arguments.overrides += rest
    keep_freed_memory()
    try:
        arguments.run(arguments)
    except (TocomError, OSError) as error:
        print(f"tocom-train: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        print(
            f"tocom-train: {error.name} is not installed: pip install 'tocom-serve[train]'",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def _parser() -> Parser:
    parser = Parser(prog="tocom-train", description=__doc__.partition("\n")[0])
    parser.hint = "; keys of a recipe are key=value"
    parser.add_argument("--version", action=Version)
    parser.add_argument("--completion", action=Completion)
    commands = parser.add_subparsers(required=True, dest="command", metavar="COMMAND")
    for name, text in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("recipe", help="a TOML file or the name of a preset", metavar="CONFIG")
        command.add_argument(
            "overrides", nargs="*", metavar="key=value", help="a change, as loop.steps=10"
        )
        command.add_argument(
            "--folder",
            dest="folder",
            type=Path,
            metavar="DIR",
            help="run folder (default: runs/NAME); a run that is there is resumed",
        )
        command.add_argument(
            "--dry-run",
            action="store_true",
            help="check the recipe and everything that it names, print what would run, and exit",
        )
        command.set_defaults(run=_run)
        command.offers["recipe"] = partial(_presets_of, name)
        if name == "finetune":
            command.add_argument(
                "--method",
                choices=["full", "linear", "lora", "adaptformer"],
                help="what is tuned (default: what the recipe says)",
            )
        if name == "vtab":
            command.add_argument(
                "--check", action="store_true", help="only say what is wrong with the data"
            )
    text = "copy a result into the folder of the model or the bank that it belongs to"
    command = commands.add_parser("attach", help=text, description=text)
    command.add_argument(
        "result", type=Path, help="evaluation.json, calibration.json or cascade.json"
    )
    command.add_argument("folder", type=Path, help="a model folder or a bank folder")
    command.set_defaults(run=_attach)
    text = "list the presets, or show one with all keys of its command"
    command = commands.add_parser("presets", help=text, description=text)
    command.add_argument("show", nargs="*", metavar="show NAME", help="show the preset NAME")
    command.set_defaults(run=_presets)
    command.offers["show"] = _words_of_presets
    return parser


def _presets_of(command: str) -> list[str]:
    from training.presets import command_of, presets

    return [each for each in presets() if command_of(each) == command]


def _words_of_presets() -> list[str]:
    from training.presets import presets

    return ["show", *presets()]


def _run(arguments: argparse.Namespace) -> None:
    # What can be told before torch is imported is told before.
    from training.presets import command_of, find_recipe, parse_overrides, read_recipe

    command, recipe = arguments.command, arguments.recipe
    path = find_recipe(recipe)
    method = [f"method={arguments.method}"] if getattr(arguments, "method", None) else []
    overrides = [*arguments.overrides, *method]
    parse_overrides(overrides)
    if path != Path(recipe) and (other := command_of(recipe)) != command:
        mine = ", ".join(_presets_of(command))
        raise ConfigError(f"{recipe} is a preset of {other}; those of {command} are: {mine}")
    if sys.stderr.isatty():  # a log needs no reason for a wait
        print(f"tocom-train {command}: starting", file=sys.stderr)
    from training.program.commands import COMMANDS as RUN
    from training.program.kinds import KINDS

    config: Any = read_recipe(KINDS[command], recipe, overrides)
    folder = arguments.folder or Path("runs") / config.name
    if arguments.dry_run:
        from training.program.dry_run import dry_run

        print(dry_run(config, folder))
    elif getattr(arguments, "check", False):
        from training.vtab.runs import check

        print(check(config))
    else:
        RUN[command](config, folder)


def _attach(arguments: argparse.Namespace) -> None:
    from training.attach import attach

    print(attach(arguments.result, arguments.folder))


def _presets(arguments: argparse.Namespace) -> None:
    from training.presets import presets, summary_of

    if not arguments.show:
        width = max(map(len, presets()))
        for command in COMMANDS:
            print(command)
            for name in _presets_of(command):
                print(f"  {name:<{width}}  {summary_of(name)}")
        return
    word, *names = arguments.show
    if word != "show" or len(names) != 1:
        raise ConfigError(f"it is presets, or presets show NAME; got {' '.join(arguments.show)}")
    if names[0] not in presets():
        meant = did_you_mean(names[0], presets())
        raise ConfigError(f"there is no preset {names[0]!r}{meant or '; presets lists them'}")
    from training.program.describe import described

    print(described(names[0]))


if __name__ == "__main__":
    sys.exit(main())
