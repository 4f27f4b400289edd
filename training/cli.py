"""`tocom-train`: distil banks, fine-tune models, measure both, keep what was measured.

Reads the arguments; what they ask for is imported after that, for which torch takes seconds.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from tocom import TocomError
from tocom.allocator import keep_freed_memory
from tocom.command_line import Parser, Version

#: The commands that take a recipe, and what they do.
COMMANDS = {
    "search": "search a ladder of cheaper forwards for a backbone; needs no labels",
    "distill": "make a bank of plug-ins for a backbone; needs no labels",
    "finetune": "tune a backbone on a labelled task",
    "evaluate": "measure a model at every rate, with and without a bank",
    "compare": "measure methods and ladders side by side on one model",
    "calibrate": "search the multiplier of a bank's deltas for a model",
    "vtab": "tune on many tasks at many rates, and make the table of all",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program and return its exit code: 0, 2 for a mistake, 130 for Ctrl-C."""
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
    except TocomError as error:
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
    parser.add_argument("--version", action=Version)
    commands = parser.add_subparsers(required=True, dest="command", metavar="COMMAND")
    for name, text in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("recipe", help="a TOML file or the name of a preset", metavar="CONFIG")
        command.add_argument("overrides", nargs="*", metavar="key=value", help="loop.steps=10")
        command.add_argument(
            "--folder",
            dest="folder",
            type=Path,
            metavar="DIR",
            help="run folder (default: runs/NAME); resumed if there",
        )
        command.set_defaults(run=_run)
        if name == "finetune":
            command.add_argument(
                "--method",
                choices=["full", "linear", "lora", "adaptformer"],
                help="what is tuned (default: what the recipe says)",
            )
        if name == "vtab":
            command.add_argument(
                "--check", action="store_true", help="only tell what is wrong with the data"
            )
    text = "keep an evaluation or a calibration with its model, or an evaluation with its bank"
    command = commands.add_parser("attach", help=text, description=text)
    command.add_argument("result", type=Path, help="an evaluation.json or calibration.json")
    command.add_argument("folder", type=Path, help="a model folder or a bank folder")
    command.set_defaults(run=_attach)
    return parser


def _run(arguments: argparse.Namespace) -> None:
    from training.presets import find_recipe, parse_overrides, read_recipe

    # Before what reads them is imported.
    find_recipe(arguments.recipe)
    method = [f"method={arguments.method}"] if getattr(arguments, "method", None) else []
    overrides = [*arguments.overrides, *method]
    parse_overrides(overrides)
    from training.program.commands import COMMANDS as RUN
    from training.program.kinds import KINDS

    config = read_recipe(KINDS[arguments.command], arguments.recipe, overrides)
    if getattr(arguments, "check", False):
        from training.vtab import check

        print(check(config))
        return
    RUN[arguments.command](config, arguments.folder or Path("runs") / config.name)


def _attach(arguments: argparse.Namespace) -> None:
    from training.attach import attach

    print(attach(arguments.result, arguments.folder))


if __name__ == "__main__":
    sys.exit(main())
