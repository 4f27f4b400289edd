"""What the commands of `tocom-serve` do, once they are known."""

import argparse
import json
import shlex
import signal
import sys
from contextlib import closing
from pathlib import Path

import server.timm_without_dynamo  # noqa: F401  # isort: split
from adapters import BankInfo
from server import offline, process
from server.arguments import MODEL_KEYS
from server.models.served import ServedModel
from server.settings import Settings, load_settings
from server.web.serving import Serving
from tocom import TOME, BackboneError, ConfigError, TocomError, bundled_folder
from tocom.allocator import keep_freed_memory

#: Options that are settings.
_SETTINGS = ("config", "host", "models", "port")


def run(parsed: argparse.Namespace) -> int:
    """Do what the arguments ask for; return the exit code.

    Raises:
        KeyboardInterrupt: if Ctrl-C ends it, or SIGTERM ends a server that is still loading.
    """
    try:
        return _COMMANDS[parsed.command](_settings(parsed), parsed)
    except TocomError as error:
        print(f"tocom-serve: {error}", file=sys.stderr)
        return 2


def _settings(parsed: argparse.Namespace) -> Settings:
    given = {name: value for name, value in vars(parsed).items() if name in _SETTINGS}
    if "models" in given:
        given["models"] = [_parse_model(text) for text in given["models"]]
    return load_settings(**given)


def _parse_model(text: str) -> dict[str, str | list[str]]:
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
        if key == "ladder":
            ladders.append(value)
        else:
            model[key] = value
    if ladders:
        model["ladders"] = ladders
    if not name or not backbone:
        raise ConfigError(f"--model {text}: expected NAME=BACKBONE")
    return model


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
    classifier = offline.Classifier(settings, asked.rate, asked.top_k)
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


def _serve(settings: Settings, _: argparse.Namespace) -> int:
    # SIGTERM ends the server as Ctrl-C does, also while it is still loading.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    # First, so that a port in use is told before models are loaded for it.
    with closing(process.bind(settings.host, settings.port)) as listener:
        host, port = listener.getsockname()[:2]
        address = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        print("Loading models ...", flush=True)
        process.serve(settings, listener, lambda serving: _greet(serving, address))
    return 0


def _greet(serving: Serving, address: str) -> None:
    models = serving.models.all()
    print(f"Serving on {address} (Ctrl-C ends it)")
    for model in models:
        bank = f"bank {info.name}" if (info := _bank(model)) else "no bank"
        print(f"  model   {model.name}: rates {_rates(model, ' to ')}, {bank}")
    rate = min(8, models[0].max_rate)
    print(f"  page    {address}/")
    print(f"  docs    {address}/docs")
    print(
        f"  try it  curl -F file=@{shlex.quote(str(_sample()))} '{address}/v1/classify?rate={rate}'"
    )
    sys.stdout.flush()


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


_COMMANDS = {"check": _check, "classify": _classify, "serve": _serve}
