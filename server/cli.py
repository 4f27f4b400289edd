"""`tocom-serve`: serve models over HTTP, or check them, or use one without a server."""

import argparse
import json
import shlex
import signal
import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import server.timm_without_dynamo  # noqa: F401  # isort: split
from server import offline, process
from server.settings import Settings, load_settings
from server.web.serving import Serving
from tocom import BackboneError, ConfigError, TocomError, bundled_folder
from tocom.allocator import keep_freed_memory

#: Options that are settings.
_SETTINGS = ("config", "host", "models", "port")
_KEYS = ("task", "bank", "architecture", "source")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Returns:
        0; 1 if a photograph could not be classified; 2 if the command could not be done; 130 if
        Ctrl-C ended it, but for a server, which is ended in no other way.
    """
    parsed = _parser().parse_args(arguments)
    try:
        return int(parsed.run(_settings(parsed), parsed))
    except TocomError as error:
        print(f"tocom-serve: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 0 if parsed.run is _serve else 130


def _parser() -> argparse.ArgumentParser:
    # What is not given is absent: a command must not overwrite what was given before it.
    common = argparse.ArgumentParser(add_help=False, argument_default=argparse.SUPPRESS)
    common.add_argument("--config", metavar="FILE", help="TOML file with settings")
    common.add_argument(
        "--model",
        dest="models",
        action="append",
        metavar="NAME=BACKBONE[,KEY=VALUE...]",
        help="model to serve instead of the bundled one; may be repeated; keys: "
        f"{', '.join(_KEYS)}; "
        "e.g. imagenet=timm/deit_tiny_patch16_224.fb_in1k,bank=bundled:deit_tiny_bank",
    )
    parser = argparse.ArgumentParser(
        prog="tocom-serve",
        parents=[common],
        argument_default=argparse.SUPPRESS,
        description="Serve vision transformers at any token-merging rate. Every setting can also "
        "be given as a TOCOM_... environment variable or in a TOML file.",
    )
    parser.add_argument("--host", help="address to listen on (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, help="port to listen on (default: 8000; 0: a free one)")
    parser.set_defaults(run=_serve)
    commands = parser.add_subparsers(title="without a server", metavar="COMMAND")

    command = commands.add_parser("check", parents=[common], help="load and run all models, once")
    command.set_defaults(run=_check)

    command = commands.add_parser("classify", parents=[common], help="tell what photographs show")
    command.add_argument("photos", nargs="+", type=Path, metavar="PHOTO")
    command.add_argument("--rate", default="0", help="tokens merged per block (default: 0)")
    command.add_argument("--top-k", type=int, metavar="K", help="predictions for each")
    command.add_argument("--json", action="store_true", help="a line of JSON for each")
    command.set_defaults(run=_classify)
    return parser


def _settings(parsed: argparse.Namespace) -> Settings:
    given = {name: value for name, value in vars(parsed).items() if name in _SETTINGS}
    if "models" in given:
        given["models"] = [_parse_model(text) for text in given["models"]]
    return load_settings(**given)


def _parse_model(text: str) -> dict[str, str]:
    """Read `NAME=BACKBONE[,KEY=VALUE...]`; what the values mean is the settings' matter."""
    first, *rest = text.split(",")
    name, _, backbone = first.partition("=")
    model = {"name": name, "backbone": backbone}
    for part in rest:
        key, _, value = part.partition("=")
        if key not in _KEYS or not value:
            raise ConfigError(
                f"--model {text}: expected KEY=VALUE with one of {', '.join(_KEYS)}, got {part!r}"
            )
        model[key] = value
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
        bank = f"{model.bank.info.name}@{model.bank.info.digest[:12]}" if model.bank else "none"
        rows.append((model.name, model.backbone.name, f"0..{model.max_rate}", bank, memory))
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
        bank = f"bank {model.bank.info.name}" if model.bank else "no bank"
        print(f"  model   {model.name}: rates 0 to {model.max_rate}, {bank}")
    rate = min(8, models[0].max_rate)
    print(f"  page    {address}/")
    print(f"  docs    {address}/docs")
    print(
        f"  try it  curl -F file=@{shlex.quote(str(_sample()))} '{address}/v1/classify?rate={rate}'"
    )
    sys.stdout.flush()


def _sample() -> Path:
    """Return a photograph to try the server with, as the shell would name it."""
    try:
        photos = sorted(bundled_folder("samples").glob("*.jpg"))
    except BackboneError:
        photos = []
    if not photos:
        return Path("photo.jpg")
    return photos[0].relative_to(Path.cwd()) if photos[0].is_relative_to(Path.cwd()) else photos[0]


if __name__ == "__main__":
    sys.exit(main())
