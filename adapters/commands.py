"""What the commands of `tocom-bank` do, once they are known."""

import argparse
import json
import sys

from adapters.card import facts, model_card, notes
from adapters.export import export_model
from adapters.hub import push_bank
from adapters.ladder import read_ladder
from adapters.peft import export_peft
from adapters.reference import import_reference
from adapters.schema import BackboneInfo
from adapters.store import Store, open_bank
from adapters.task import open_task
from tocom import load_backbone
from tocom.wording import one_line


def run(arguments: argparse.Namespace) -> int:
    """Do what the arguments ask for; return the exit code.

    Raises:
        TocomError, OSError: if it cannot be done.
    """
    if "store" in arguments:
        arguments.store = Store(arguments.store)
    return int(_COMMANDS[arguments.command](arguments) or 0)


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
        print(one_line(f"{what:<{width}}  {value}").rstrip())


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


_COMMANDS = {
    "inspect": _inspect,
    "list": _list,
    "verify": _verify,
    "publish": _publish,
    "delete": _delete,
    "export": _export,
    "export-model": _export_model,
    "push": _push,
    "card": _card,
    "import": _import,
}
