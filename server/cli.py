"""`tocom-serve`: serve models over HTTP until Ctrl-C."""

import argparse
import logging
import shlex
import signal
import socket
import sys
from collections.abc import Sequence
from contextlib import ExitStack, closing
from pathlib import Path

import uvicorn

from server.app import create_app
from server.routes import Serving
from server.settings import Settings, load_settings
from tocom import BackboneError, ConfigError, TocomError, bundled_folder

_KEYS = ("bank", "architecture", "source")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the server; return 0 after Ctrl-C or SIGTERM, 2 if it cannot be started as asked."""
    parsed = _parser().parse_args(arguments)
    # SIGTERM ends the server as Ctrl-C does, also while it is still loading.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        given = {key: value for key, value in vars(parsed).items() if value is not None}
        if "models" in given:
            given["models"] = [_parse_model(text) for text in given["models"]]
        settings = load_settings(**given)
        # First, so that a port in use is told before models are loaded for it.
        with closing(_bind(settings.host, settings.port)) as listener:
            _serve(settings, listener)
    except TocomError as error:
        print(f"tocom-serve: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        pass
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tocom-serve",
        description="Serve vision transformers at any token-merging rate. Every setting can also "
        "be given as a TOCOM_... environment variable or in a TOML file.",
    )
    parser.add_argument("--host", help="address to listen on (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, help="port to listen on (default: 8000; 0: a free one)")
    parser.add_argument("--config", metavar="FILE", help="TOML file with settings")
    parser.add_argument(
        "--model",
        dest="models",
        action="append",
        metavar="NAME=BACKBONE[,KEY=VALUE...]",
        help="model to serve instead of the bundled one; may be repeated; keys: "
        f"{', '.join(_KEYS)}; "
        "e.g. imagenet=timm/deit_tiny_patch16_224.fb_in1k,bank=bundled:deit_tiny_bank",
    )
    return parser


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


def _bind(host: str, port: int) -> socket.socket:
    with ExitStack() as on_error:
        try:
            family, kind, protocol, _, address = socket.getaddrinfo(
                host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )[0]
            listener = on_error.enter_context(socket.socket(family, kind, protocol))
            # A port that a former server has just left may be taken at once.
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
        except OSError as error:
            raise ConfigError(f"cannot listen on {host}, port {port}: {error.strerror}") from error
        on_error.pop_all()
        return listener


def _serve(settings: Settings, listener: socket.socket) -> None:
    logging.basicConfig(format="%(levelname)s: %(message)s")
    # Ours alone: the libraries' own notes are of no use to who only serves.
    logging.getLogger("server").setLevel(settings.log_level.upper())
    print("Loading models ...", flush=True)
    app = create_app(settings)
    config = uvicorn.Config(
        app,
        log_level=settings.log_level,
        # Requests end at their own deadline, before they would be cut off.
        timeout_graceful_shutdown=settings.timeout_ms // 1000 + 2,
    )
    host, port = listener.getsockname()[:2]
    address = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    _Server(config, _greeting(app.state.serving, address)).run(sockets=[listener])


class _Server(uvicorn.Server):
    """Uvicorn that tells its user what to do next once it serves."""

    def __init__(self, config: uvicorn.Config, greeting: str) -> None:
        super().__init__(config)
        self._greeting = greeting

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        print(self._greeting, flush=True)


def _greeting(serving: Serving, address: str) -> str:
    lines = [f"Serving on {address} (Ctrl-C ends it)"]
    for model in serving.models.values():
        bank = f"bank {model.bank.info.name}" if model.bank else "no bank"
        lines.append(f"  model   {model.name}: rates 0 to {model.max_rate}, {bank}")
    rate = min(8, serving.model(None).max_rate)
    photo = shlex.quote(str(_sample()))
    lines.append(f"  docs    {address}/docs")
    lines.append(f"  try it  curl -F file=@{photo} '{address}/v1/classify?rate={rate}'")
    return "\n".join(lines)


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
