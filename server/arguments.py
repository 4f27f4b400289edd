"""The arguments of `tocom-serve`. Needs no torch, which takes seconds to import."""

import argparse
from pathlib import Path

#: What may be said of a model besides its name and backbone.
MODEL_KEYS = ("task", "bank", "architecture", "source", "ladder")


def parser() -> argparse.ArgumentParser:
    """Return what reads the arguments; `command` says what they ask for."""
    # What is not given is absent: a command must not overwrite what was given before it.
    common = argparse.ArgumentParser(add_help=False, argument_default=argparse.SUPPRESS)
    common.add_argument("--config", metavar="FILE", help="TOML file with settings")
    common.add_argument(
        "--model",
        dest="models",
        action="append",
        metavar="NAME=BACKBONE[,KEY=VALUE...]",
        help="model to serve instead of the bundled one; may be repeated; keys: "
        f"{', '.join(MODEL_KEYS)}, of which ladder may be repeated; "
        "e.g. imagenet=timm/deit_tiny_patch16_224.fb_in1k,bank=bundled:deit_tiny_bank",
    )
    whole = argparse.ArgumentParser(
        prog="tocom-serve",
        parents=[common],
        argument_default=argparse.SUPPRESS,
        description="Serve vision transformers at any token-merging rate. Every setting can also "
        "be given as a TOCOM_... environment variable or in a TOML file.",
    )
    whole.add_argument("--host", help="address to listen on (default: 127.0.0.1)")
    whole.add_argument("--port", type=int, help="port to listen on (default: 8000; 0: a free one)")
    whole.set_defaults(command="serve")
    commands = whole.add_subparsers(title="without a server", metavar="COMMAND")

    command = commands.add_parser("check", parents=[common], help="load and run all models, once")
    command.set_defaults(command="check")

    command = commands.add_parser("classify", parents=[common], help="tell what photographs show")
    command.add_argument("photos", nargs="+", type=Path, metavar="PHOTO")
    command.add_argument(
        "--rate",
        default="0",
        help="rate on the default ladder: of `tome`, tokens merged per block (default: 0)",
    )
    command.add_argument("--top-k", type=int, metavar="K", help="predictions for each")
    command.add_argument("--json", action="store_true", help="a line of JSON for each")
    command.set_defaults(command="classify")
    return whole
