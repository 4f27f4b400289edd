"""`tocom-train`: distil banks, fine-tune models, measure both, keep what was measured."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from tocom import TocomError
from tocom.allocator import keep_freed_memory
from training.config import (
    DistillConfig,
    FinetuneConfig,
)
from training.ladders.compare_config import CompareConfig
from training.ladders.search_config import LadderSearchConfig
from training.measuring_config import CalibrateConfig, EvaluateConfig
from training.presets import presets, read_recipe
from training.vtab.config import VtabConfig


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program and return its exit code: 0, 2 for a mistake, 130 if it was stopped."""
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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tocom-train", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, run, text in (
        ("search", _search, "search a ladder of cheaper forwards for a backbone; needs no labels"),
        ("distill", _distill, "make a bank of plug-ins for a backbone; needs no labels"),
        ("finetune", _finetune, "tune a backbone on a labelled task"),
        ("evaluate", _evaluate, "measure a model at every rate, with and without a bank"),
        ("compare", _compare, "measure methods and ladders side by side on one model"),
        ("calibrate", _calibrate, "search the multiplier of a bank's deltas for a model"),
        ("vtab", _vtab, "tune on many tasks at many rates, and make the table of all"),
    ):
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument(
            "recipe", help=f"a TOML file or a preset ({', '.join(presets())})", metavar="CONFIG"
        )
        command.add_argument("overrides", nargs="*", metavar="key=value", help="loop.steps=10")
        command.add_argument(
            "--folder",
            dest="folder",
            type=Path,
            metavar="DIR",
            help="run folder (default: runs/NAME); resumed if there",
        )
        command.set_defaults(run=run)
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


def _search(arguments: argparse.Namespace) -> None:
    from training.ladders.search import search

    config = read_recipe(LadderSearchConfig, arguments.recipe, arguments.overrides)
    path = search(config, _folder(arguments, config.name))
    print((path.parent / "search.md").read_text(encoding="utf-8"), file=sys.stderr)
    print(path)


def _distill(arguments: argparse.Namespace) -> None:
    from training.distill import distill  # keeps `--help` quick

    config = read_recipe(DistillConfig, arguments.recipe, arguments.overrides)
    print(distill(config, _folder(arguments, config.name)))


def _finetune(arguments: argparse.Namespace) -> None:
    from training.finetune import finetune

    method = [f"method={arguments.method}"] if arguments.method else []
    config = read_recipe(FinetuneConfig, arguments.recipe, arguments.overrides + method)
    print(finetune(config, _folder(arguments, config.name)))


def _evaluate(arguments: argparse.Namespace) -> None:
    from training.evaluate import evaluate

    config = read_recipe(EvaluateConfig, arguments.recipe, arguments.overrides)
    print(evaluate(config, _folder(arguments, config.name)))


def _compare(arguments: argparse.Namespace) -> None:
    from training.ladders.compare import compare_methods

    config = read_recipe(CompareConfig, arguments.recipe, arguments.overrides)
    print(compare_methods(config, _folder(arguments, config.name)))


def _calibrate(arguments: argparse.Namespace) -> None:
    from training.calibrate import calibrate

    config = read_recipe(CalibrateConfig, arguments.recipe, arguments.overrides)
    path = calibrate(config, _folder(arguments, config.name))
    print(json.loads(path.read_text(encoding="utf-8"))["summary"], file=sys.stderr)
    print(path)


def _vtab(arguments: argparse.Namespace) -> None:
    from training.vtab.runs import check, vtab

    config = read_recipe(VtabConfig, arguments.recipe, arguments.overrides)
    if arguments.check:
        print(check(config))
    else:
        print(vtab(config, _folder(arguments, config.name)))


def _attach(arguments: argparse.Namespace) -> None:
    from training.attach import attach

    print(attach(arguments.result, arguments.folder))


def _folder(arguments: argparse.Namespace, name: str) -> Path:
    return arguments.folder or Path("runs") / name


if __name__ == "__main__":
    sys.exit(main())
