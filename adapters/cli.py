"""`tocom-bank`: look at banks, publish them, share them, take them elsewhere.

Reads the arguments; what they ask for is imported after that, for which torch takes seconds.
"""

import signal
import sys
from pathlib import Path

from tocom import TocomError
from tocom.command_line import Parser, Version
from tocom.completion import Completion

_REFERENCE = "NAME, NAME@DIGEST or DIGEST"
_BANK = f"a bank folder, bundled:NAME, hf://ORG/NAME[@REVISION], or {_REFERENCE} in the store"


def main(argv: list[str] | None = None) -> int:
    """Run the command.

    Returns:
        The exit code: 0; 1 if `verify` found a fault; 2 if the command could not be done; 130 if
        Ctrl-C ended it.
    """
    arguments = _parser().parse_args(argv)
    try:
        from adapters import commands

        return commands.run(arguments)
    except (TocomError, OSError) as error:
        print("tocom-bank:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


def _parser() -> Parser:
    parser = Parser(
        prog="tocom-bank", description="Inspect, keep, share and export banks of plug-ins."
    )
    parser.add_argument("--version", action=Version)
    parser.add_argument("--completion", action=Completion)
    commands = parser.add_subparsers(required=True, dest="command", metavar="COMMAND")
    store = Parser(add_help=False)
    store.add_argument(
        "--store",
        metavar="DIR",
        type=Path,
        help="folder of published banks; default: $TOCOM_STORE, or ~/.local/share/tocom/store",
    )

    command = commands.add_parser("inspect", parents=[store], help="show what a bank is")
    command.add_argument("bank", help=_BANK)
    command.add_argument("--json", action="store_true", help="print JSON")

    command = commands.add_parser("list", parents=[store], help="list the published banks")

    command = commands.add_parser("verify", parents=[store], help="check that banks are undamaged")
    command.add_argument("bank", nargs="?", help=f"{_BANK}; default: all in the store")

    command = commands.add_parser(
        "publish",
        parents=[store],
        help="add a bank to the store; its name then means this version",
    )
    command.add_argument("bank", help=_BANK)

    command = commands.add_parser("delete", parents=[store], help="remove a bank from the store")
    command.add_argument("reference", help=_REFERENCE)

    command = commands.add_parser(
        "export",
        parents=[store],
        help="write the delta between two rates as a LoRA adapter for PEFT",
    )
    command.add_argument("bank", help=_BANK)
    command.add_argument("folder", help="where to write; PeftModel.from_pretrained reads it")
    command.add_argument(
        "--source", type=int, required=True, help="rate that the model was tuned at"
    )
    command.add_argument("--target", type=int, required=True, help="rate that it will run at")

    command = commands.add_parser(
        "export-model", parents=[store], help="write a model at one rate for another runtime"
    )
    command.add_argument(
        "model", help="bundled:NAME, a model folder, a .safetensors file or a name that timm loads"
    )
    command.add_argument("output", help="file to write: .onnx, or .xml for OpenVINO")
    command.add_argument("--rate", type=int, required=True, help="rate it will run at")
    command.add_argument("--bank", help=f"{_BANK}; default: none")
    command.add_argument("--task", metavar="FOLDER", help="task to put on the model")
    command.add_argument(
        "--source", type=int, help="rate that the model was tuned at; default: what its folder says"
    )
    command.add_argument(
        "--ladder",
        metavar="FILE",
        help="ladder.json of the rates; default: the bank's, or else the task's",
    )
    command.add_argument("--architecture", help="timm's name, if MODEL is a .safetensors file")

    page = Parser(add_help=False)
    page.add_argument(
        "--license",
        metavar="ID",
        help="licence that the card states, such as apache-2.0; default: none",
    )
    page.add_argument(
        "--plot",
        dest="plots",
        metavar="FILE",
        type=Path,
        nargs="+",
        action="extend",
        default=[],
        help="plots to show on the card",
    )

    command = commands.add_parser(
        "push", parents=[store, page], help="upload a bank to the Hugging Face Hub"
    )
    command.add_argument("bank", help=_BANK)
    command.add_argument(
        "repo_id", metavar="ORG/NAME", help="repository; made if it does not exist"
    )
    command.add_argument(
        "--private", action="store_true", default=None, help="make the repository private"
    )
    command.add_argument("--revision", metavar="BRANCH", help="branch; made if it does not exist")

    command = commands.add_parser(
        "card", parents=[store, page], help="print the model card that push uploads"
    )
    command.add_argument("bank", help=_BANK)
    command.add_argument("repo_id", metavar="ORG/NAME", nargs="?", help="repository that it is for")

    command = commands.add_parser(
        "import", help="make a bank from a checkpoint of ToCom's own code"
    )
    command.add_argument("checkpoint", help=".safetensors or .pth; read as tensors only")
    command.add_argument("folder", help="the new bank folder")
    command.add_argument("--name", required=True, help="name of the new bank")
    command.add_argument(
        "--backbone", required=True, metavar="MODEL", help="model that it was distilled for"
    )
    command.add_argument("--architecture", help="timm's name, if MODEL is a .safetensors file")
    command.add_argument("--max-rate", type=int, help="steps; default: the reference's 16")
    command.add_argument(
        "--rank", type=int, help="rank of a step; default: as the checkpoint has it"
    )
    command.add_argument("--scale", type=float, default=0.1, help="multiplier; default: 0.1")
    return parser


if __name__ == "__main__":
    sys.exit(main())
