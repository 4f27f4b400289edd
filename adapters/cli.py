"""`tocom-bank`: look at banks, publish them, share them, take them elsewhere."""

import argparse
import json
import sys
from pathlib import Path

from adapters.card import facts, model_card, notes
from adapters.export import export_model
from adapters.hub import push_bank
from adapters.ladder import read_ladder
from adapters.peft import export_peft
from adapters.reference import REFERENCE_MAX_RATE, import_reference
from adapters.schema import BackboneInfo
from adapters.store import Store, open_bank
from adapters.task import open_task
from tocom import TocomError, load_backbone

_REFERENCE = "NAME, NAME@DIGEST or DIGEST"
_BANK = f"a bank folder, bundled:NAME, hf://ORG/NAME[@REVISION], or {_REFERENCE} in the store"


def main(argv: list[str] | None = None) -> int:
    """Run the command.

    Returns:
        The exit code: 0; 1 if `verify` found a fault; 2 if the command could not be done.
    """
    arguments = _parser().parse_args(argv)
    try:
        return int(arguments.run(arguments) or 0)
    except (TocomError, OSError) as error:
        print("tocom-bank:", " ".join(str(error).split()), file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tocom-bank", description="Banks of ToCom plug-ins.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    store = argparse.ArgumentParser(add_help=False)
    store.add_argument(
        "--store",
        metavar="DIR",
        type=Store,
        default=Store(),
        help="default: $TOCOM_STORE, or ~/.local/share/tocom/store",
    )

    command = commands.add_parser("inspect", parents=[store], help="show what a bank is")
    command.add_argument("bank", help=_BANK)
    command.add_argument("--json", action="store_true", help="for programs")
    command.set_defaults(run=_inspect)

    command = commands.add_parser("list", parents=[store], help="list what is published")
    command.set_defaults(run=_list)

    command = commands.add_parser("verify", parents=[store], help="read and hash banks again")
    command.add_argument("bank", nargs="?", help=f"{_BANK}; default: all in the store")
    command.set_defaults(run=_verify)

    command = commands.add_parser(
        "publish",
        parents=[store],
        help="add a bank to the store and make it its name's current one",
    )
    command.add_argument("bank", help=_BANK)
    command.set_defaults(run=_publish)

    command = commands.add_parser("delete", parents=[store], help="remove a bank from the store")
    command.add_argument("reference", help=_REFERENCE)
    command.set_defaults(run=_delete)

    command = commands.add_parser(
        "export", parents=[store], help="write the delta between two rates as a LoRA for PEFT"
    )
    command.add_argument("bank", help=_BANK)
    command.add_argument("folder", help="the new folder, for PeftModel.from_pretrained")
    command.add_argument("--source", type=int, required=True, help="rate the model was tuned at")
    command.add_argument("--target", type=int, required=True, help="rate it will run at")
    command.set_defaults(run=_export)

    command = commands.add_parser(
        "export-model", parents=[store], help="write a model at one rate for another runtime"
    )
    command.add_argument("model", help="as tocom-serve takes it")
    command.add_argument("output", help="the new file: .onnx, or .xml for OpenVINO")
    command.add_argument("--rate", type=int, required=True, help="rate it will run at")
    command.add_argument("--bank", help=f"{_BANK}; default: it runs without compensation")
    command.add_argument("--task", metavar="FOLDER", help="task to put on the model")
    command.add_argument("--source", type=int, help="rate it was tuned at; default: its own")
    command.add_argument(
        "--ladder",
        metavar="FILE",
        help="ladder.json that the rates are of; default: the bank's, or else the task's",
    )
    command.add_argument("--architecture", help="timm's name, if MODEL is a .safetensors file")
    command.set_defaults(run=_export_model)

    page = argparse.ArgumentParser(add_help=False)
    page.add_argument("--license", metavar="ID", help="such as apache-2.0; default: none claimed")
    page.add_argument(
        "--plot",
        dest="plots",
        metavar="FILE",
        type=Path,
        nargs="+",
        action="extend",
        default=[],
        help="pictures to show",
    )

    command = commands.add_parser(
        "push", parents=[store, page], help="upload a bank to the Hugging Face Hub"
    )
    command.add_argument("bank", help=_BANK)
    command.add_argument("repo_id", metavar="ORG/NAME", help="made if it is not there")
    command.add_argument("--private", action="store_true", default=None, help="for you alone")
    command.add_argument("--revision", metavar="BRANCH", help="made if it is not there")
    command.set_defaults(run=_push)

    command = commands.add_parser(
        "card", parents=[store, page], help="print the model card that push uploads"
    )
    command.add_argument("bank", help=_BANK)
    command.add_argument("repo_id", metavar="ORG/NAME", nargs="?", help="where it will be")
    command.set_defaults(run=_card)

    command = commands.add_parser("import", help="make a bank of a checkpoint of the reference")
    command.add_argument("checkpoint", help=".safetensors or .pth; read as tensors only")
    command.add_argument("folder", help="the new bank folder")
    command.add_argument("--name", required=True, help="what the bank is called from now on")
    command.add_argument(
        "--backbone", required=True, metavar="MODEL", help="what it was distilled for"
    )
    command.add_argument("--architecture", help="timm's name, if MODEL is a .safetensors file")
    command.add_argument("--max-rate", type=int, help=f"steps; default: {REFERENCE_MAX_RATE}")
    command.add_argument("--rank", type=int, help="width of a step; default: what the steps leave")
    command.add_argument("--scale", type=float, default=0.1, help="multiplier; default: 0.1")
    command.set_defaults(run=_import)
    return parser


def _inspect(arguments: argparse.Namespace) -> None:
    bank = open_bank(arguments.bank, arguments.store)
    if arguments.json:
        info = bank.info.model_dump(mode="json")
        size = sum(tensor.nbytes for tensor in bank.tensors.values())
        print(json.dumps(info | {"parameters": bank.parameters, "bytes": size}, indent=2))
        return
    rows = [
        *facts(bank),
        *notes("training", bank.info.training),
        *notes("evaluation", bank.info.evaluation),
    ]
    width = max(len(what) for what, _ in rows)
    for what, value in rows:
        print(f"{what:<{width}}  {value}".rstrip())


def _list(arguments: argparse.Namespace) -> None:
    for version in arguments.store.versions():
        print(f"{version.reference}{'  current' if version.current else ''}")


def _verify(arguments: argparse.Namespace) -> int:
    if arguments.bank is not None:
        bank = open_bank(arguments.bank, arguments.store)
        print(f"{bank.info.name}@{bank.info.digest[:12]} is whole")
        return 0
    faults: dict[str, str] = arguments.store.verify()
    for reference, fault in faults.items():
        print(f"{reference}: {fault}", file=sys.stderr)
    print(f"{len(arguments.store.versions())} published, {len(faults)} faults")
    return 1 if faults else 0


def _publish(arguments: argparse.Namespace) -> None:
    print(arguments.store.publish(open_bank(arguments.bank, arguments.store)))


def _delete(arguments: argparse.Namespace) -> None:
    print(f"{arguments.store.delete(arguments.reference)} is deleted")


def _export(arguments: argparse.Namespace) -> None:
    bank = open_bank(arguments.bank, arguments.store)
    print(export_peft(bank, arguments.source, arguments.target, arguments.folder))


def _export_model(arguments: argparse.Namespace) -> None:
    backbone = load_backbone(arguments.model, arguments.architecture)
    if arguments.task is not None:
        backbone = open_task(arguments.task).on(backbone)
    bank = open_bank(arguments.bank, arguments.store) if arguments.bank is not None else None
    ladder = read_ladder(arguments.ladder).ladder() if arguments.ladder is not None else None
    print(export_model(backbone, arguments.rate, arguments.output, bank, arguments.source, ladder))


def _push(arguments: argparse.Namespace) -> None:
    print(
        push_bank(
            open_bank(arguments.bank, arguments.store),
            arguments.repo_id,
            private=arguments.private,
            revision=arguments.revision,
            plots=arguments.plots,
            license=arguments.license,
        )
    )


def _card(arguments: argparse.Namespace) -> None:
    bank = open_bank(arguments.bank, arguments.store)
    repo_id = arguments.repo_id or f"ORG/{bank.info.name}"
    print(model_card(bank, repo_id, license=arguments.license, plots=arguments.plots))


def _import(arguments: argparse.Namespace) -> None:
    backbone = load_backbone(arguments.backbone, arguments.architecture)
    bank = import_reference(
        arguments.checkpoint,
        arguments.name,
        BackboneInfo.of(backbone),
        max_rate=arguments.max_rate,
        rank=arguments.rank,
        scale=arguments.scale,
    )
    print(bank.save(arguments.folder))


if __name__ == "__main__":
    sys.exit(main())
