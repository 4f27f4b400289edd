"""What the commands of `tocom-serve` do, and what it says once it serves."""

import argparse
import json
import shlex
import sys
from pathlib import Path

import server.models.timm_without_dynamo  # noqa: F401  # isort: split
from adapters import BankInfo
from server import offline
from server.inference.run import ROUTES
from server.models.served import ServedModel
from server.settings import Settings
from server.web.serving import Serving
from tocom import TOME, BackboneError, TocomError, bundled_folder
from tocom.allocator import keep_freed_memory


def run(settings: Settings, parsed: argparse.Namespace) -> int:
    """Do what the arguments ask for without a server; return the exit code.

    Raises:
        TocomError: if it cannot be done.
    """
    return _COMMANDS[parsed.command](settings, parsed)


def _check(settings: Settings, _: argparse.Namespace) -> int:
    rows = [("model", "backbone", "rates", "bank", "memory")]
    for checked in offline.check(settings):
        model = checked.model
        memory = f"{checked.weights / 1e6:.1f} MB"
        if checked.folded:
            memory += f", {checked.folded / 1e6:.1f} MB more once every rate was asked for"
        bank = f"{info.name}@{info.digest[:12]}" if (info := _bank(model)) else "none"
        rows.append((model.name, model.backbone.name, _rates(model, ".."), bank, memory))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        print("  ".join(cells).rstrip())
    return 0


def _classify(settings: Settings, asked: argparse.Namespace) -> int:
    keep_freed_memory()
    classifier = offline.Classifier(settings, asked.rate, asked.predictions)
    failed = 0
    for photo in asked.photos:
        try:
            predictions = classifier.classify(photo)
        except TocomError as error:
            print(f"tocom-serve: {photo}: {error}", file=sys.stderr)
            failed = 1
            continue
        if asked.json:
            found = {
                "photo": str(photo),
                "model": classifier.model.name,
                "rate": classifier.work.rate,
                "compensate": classifier.work.compensate,
                "predictions": [prediction.model_dump() for prediction in predictions],
            }
            print(json.dumps(found), flush=True)
        else:
            print(photo)
            for prediction in predictions:
                print(f"  {prediction.score:6.1%}  {prediction.label}", flush=True)
    return failed


def greet(serving: Serving, address: str) -> None:
    """Say what is served and how to use it."""
    models = serving.models.all()
    print(f"Serving on {address} (Ctrl-C ends it)")
    for model in models:
        bank = f"bank {info.name}" if (info := _bank(model)) else "no bank"
        print(f"  model   {model.name}: rates {_rates(model, ' to ')}, {bank}")
    rate = min(8, models[0].max_rate)
    print(f"  page    {address}/")
    print(f"  docs    {address}/docs")
    ask, file = f"{address}{ROUTES[models[0].kind]}?rate={rate}", shlex.quote(str(_sample()))
    print(f"  try it  curl -F file=@{file} '{ask}'", flush=True)


def _rates(model: ServedModel, to: str) -> str:
    """Say which rates a model runs at, and on which ladders if there are more than the paper's."""
    if model.ladders == (model,) and model.ladder == TOME:
        return f"0{to}{model.max_rate}"
    return ", ".join(f"0{to}{each.max_rate} on {each.ladder.name}" for each in model.ladders)


def _bank(model: ServedModel) -> BankInfo | None:
    bank = model.repaired.bank
    return None if bank is None else bank.info


def _sample() -> Path:
    """Return a photograph to try the server with, as the shell would name it."""
    try:
        photos = sorted(bundled_folder("samples").glob("*.jpg"))
    except BackboneError:
        photos = []
    if not photos:
        return Path("photo.jpg")
    return photos[0].relative_to(Path.cwd()) if photos[0].is_relative_to(Path.cwd()) else photos[0]


_COMMANDS = {"check": _check, "classify": _classify}
