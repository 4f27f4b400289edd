"""The server as a Ray Serve deployment: one replica for each device, on one machine or many.

A replica is the whole application with an engine of its own, so that it answers as `tocom-serve`
does; Ray's proxies share requests out among replicas, and Ray starts, checks, replaces and
scales them. `python -m server.ray` starts it all on this machine; docs/scaling.md has the rest.

Banks are changed for all replicas at once, in place, by the deployment's `user_config`.
"""

import argparse
import asyncio
import os
import re
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, NoReturn

from fastapi import FastAPI
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from adapters.store import Store
from server.app import create_app
from server.banks.catalogue import Banks
from server.errors import ForbiddenError
from server.observe import log
from server.process import bind
from server.settings import Settings, load_settings
from server.web.middleware import REQUEST_ID
from tocom import ConfigError, TocomError

try:
    import ray
    from ray import serve
    from ray.serve.context import _get_global_client
    from ray.serve.schema import ApplicationStatus, ServeDeploySchema
except ImportError as error:
    raise ImportError("server.ray wants Ray: pip install 'tocom-serve[ray]'") from error

#: Of the application and of its one deployment.
NAME = "tocom"


def _check_pinned(reference: str) -> str:
    if not re.fullmatch(r"(?:[^@]+@)?[0-9a-f]{8,64}", reference):
        raise ValueError(
            "a bank is NAME@DIGEST or 8 or more digits of its digest: a name alone may come to "
            "mean another one, and replicas that start later would differ"
        )
    return reference


class UserConfig(BaseModel):
    """What can be changed while replicas run: Ray hands it to each of them."""

    model_config = ConfigDict(extra="forbid")

    banks: dict[str, Annotated[str, AfterValidator(_check_pinned)] | None] = Field(
        default={},
        description="bank of a model, by its name; null: none; not named: as the settings say",
    )


class Arguments(BaseModel):
    """What the application is built from: `args` in a Serve config file."""

    model_config = ConfigDict(extra="forbid")

    config: str | None = Field(
        default=None, description="TOML file with settings, where Ray's head node finds it"
    )
    settings: dict[str, Any] = Field(default={}, description="settings that win over all others")


class _FixedBanks(Banks):
    """Banks that no request can change: it would reach one replica of many."""

    def _refuse(self, *args: object, **kwargs: object) -> NoReturn:
        raise ForbiddenError(
            "this server is one of several replicas, whose banks are changed together: publish "
            "the bank in the store and name it in the deployment's user_config"
        )

    add = delete = attach = detach = _refuse


class _Behind:
    """Fits answers to Ray's proxy, and tells in X-Replica whose they are."""

    def __init__(self, app: ASGIApp, replica: str) -> None:
        self.app = app
        self.replica = replica

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_marked(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers["X-Replica"] = self.replica
                del headers[REQUEST_ID]  # the proxy adds the same one again
            await send(message)

        await self.app(scope, receive, send_marked)


class Replica:
    """One server among several. Ray calls all of this; requests go to the application."""

    def __init__(self, settings: Settings) -> None:
        """Load the models; Ray then runs the application's start, which warms them.

        Raises:
            TocomError: if one cannot be loaded.
        """
        log.configure(settings)
        if settings.device == "auto":
            # Without a GPU of its own a replica still sees those of the others.
            device = "cuda" if ray.get_gpu_ids() else "cpu"
            settings = settings.model_copy(update={"device": device})
        self._app = create_app(settings)
        self._serving = self._app.state.serving
        self._banks: Banks = self._app.state.banks
        self._app.state.banks = _FixedBanks(self._serving.models, Store(settings.store))
        self._configured = {
            model.name: model.bank.info.digest if model.bank else None
            for model in self._serving.models.all()
        }
        replica = serve.get_replica_context().replica_id.unique_id
        self._app.add_middleware(_Behind, replica=replica)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return self._app

    async def check_health(self) -> None:  # not in a thread, all of which may be busy
        """Raise UnavailableError if the engine gives no sign of life: Ray replaces the replica."""
        self._serving.check_alive()

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Serve every model with its bank of a UserConfig, whatever it was served with before.

        Raises:
            ServerError: if a bank cannot be had or does not fit; Ray gives the replica up then.
        """
        banks = self._configured | UserConfig.model_validate(user_config).banks
        for model, bank in banks.items():
            if bank is None:
                await asyncio.to_thread(self._banks.detach, model)
            else:
                await asyncio.to_thread(self._banks.attach, model, bank)


def build(arguments: Arguments) -> serve.Application:
    """Return the application for Ray: `import_path` in a Serve config file.

    How many replicas there are, what each is given and `user_config` are the file's matter.

    Raises:
        ConfigError: if the settings are wrong.
    """
    settings = load_settings(arguments.config, **arguments.settings)
    deployment = serve.deployment(
        serve.ingress()(Replica),
        name=NAME,
        ray_actor_options={"num_cpus": 1, "num_gpus": _gpus(settings)},
        user_config=UserConfig().model_dump(),
        # More than an engine takes: what it knows of, it plans with, and it refuses by itself.
        max_ongoing_requests=2 * settings.max_queue,
        # These wait at a proxy, and only while there is no replica to send them to.
        max_queued_requests=settings.max_queue,
        backpressure_config={"retry_after_s": 1},
        # Requests end at their own deadline, before their replica does.
        graceful_shutdown_timeout_s=settings.timeout_ms / 1000 + 2,
        health_check_period_s=2,  # also how soon a replica that died is missed
        max_constructor_retry_count=3,
        logging_config={"enable_access_log": False},  # replicas log requests themselves
    )
    # Of a class that replicas can import; load_settings() makes one of its own.
    return deployment.bind(Settings.model_construct(**dict(settings)))


def _gpus(settings: Settings) -> int:
    """Return how many GPUs a replica needs: one, if there are any where it may use them."""
    if settings.device not in ("auto", "cpu", "cuda"):
        raise ConfigError(
            "setting device: Ray gives each replica its own; it must be auto, cpu or cuda, got "
            f"{settings.device!r}"
        )
    if settings.device == "auto":
        return int(ray.is_initialized() and ray.cluster_resources().get("GPU", 0) > 0)
    return int(settings.device == "cuda")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run replicas on this machine, or change those of a cluster.

    Returns:
        0, here once Ctrl-C or SIGTERM ends it; 2 if it cannot be done.
    """
    parsed = _parser().parse_args(arguments)
    # Ray reports how it is used unless it is told not to.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        if not 1 <= parsed.replicas <= (parsed.max_replicas or parsed.replicas):
            raise ConfigError("--replicas must be 1 or more, and --max-replicas no less")
        where = {"host": parsed.host, "port": parsed.port}
        given = {name: value for name, value in where.items() if value is not None}
        settings = load_settings(parsed.config, **given)
        banks = _parse_banks(parsed.banks)
        if parsed.address:
            _connect(parsed.address)
            _deploy(parsed.config, _deployment(parsed, settings, banks))
        else:
            _run(parsed, settings, banks)
    except TocomError as error:
        print(f"server.ray: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        pass
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m server.ray",
        description="Serve with several replicas, each with a device of its own, by Ray.",
    )
    parser.add_argument("--config", metavar="FILE", help="TOML file with settings")
    parser.add_argument("--host", help="address to listen on (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, help="port to listen on (default: 8000)")
    parser.add_argument(
        "--replicas", type=int, default=1, metavar="N", help="how many there are (default: 1)"
    )
    parser.add_argument(
        "--max-replicas", type=int, metavar="N", help="how many there are at most, under load"
    )
    parser.add_argument(
        "--cpus", type=float, default=1, metavar="N", help="processors of each (default: 1)"
    )
    parser.add_argument(
        "--bank",
        dest="banks",
        action="append",
        default=[],
        metavar="MODEL=NAME@DIGEST",
        help="bank for a model in place of the one in the settings; MODEL= for none; may be "
        "repeated",
    )
    parser.add_argument(
        "--address",
        help="Ray cluster that runs already, or auto: what runs there becomes what is asked for "
        "here, and goes on running",
    )
    return parser


def _parse_banks(texts: Sequence[str]) -> UserConfig:
    banks = {}
    for text in texts:
        model, equals, bank = text.partition("=")
        if not model or not equals:
            raise ConfigError(f"--bank {text}: expected MODEL=NAME@DIGEST")
        banks[model] = bank or None
    try:
        return UserConfig.model_validate({"banks": banks})
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(f"--bank {first['loc'][1]}={first['input']}: {first['msg']}") from error


def _deployment(
    parsed: argparse.Namespace, settings: Settings, banks: UserConfig
) -> dict[str, Any]:
    """Return what a Serve config file would say of the deployment; Ray must be there."""
    deployment: dict[str, Any] = {
        "name": NAME,
        "ray_actor_options": {"num_cpus": parsed.cpus, "num_gpus": _gpus(settings)},
        "user_config": banks.model_dump(),
    }
    if parsed.max_replicas is None:
        deployment["num_replicas"] = parsed.replicas
    else:
        deployment["autoscaling_config"] = {
            "min_replicas": parsed.replicas,
            "max_replicas": parsed.max_replicas,
            "target_ongoing_requests": settings.max_batch,
        }
    return deployment


def _run(parsed: argparse.Namespace, settings: Settings, banks: UserConfig) -> None:
    """Serve by a Ray of our own until a signal asks for the end."""
    # Ray would share a port that is in use with whoever has it.
    with closing(bind(settings.host, settings.port)) as listener:
        port = listener.getsockname()[1]
    # Large requests pass through the object store, and what it cannot hold through files.
    ray.init(include_dashboard=False, object_store_memory=256 * 2**20)
    # In place of Ray's own handler, which leaves at once.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        deployment = _deployment(parsed, settings, banks)
        _check_fits(parsed.replicas, deployment["ray_actor_options"])
        print("Loading models ...", flush=True)
        http_options = {"host": settings.host, "port": port}
        serve.start(http_options=http_options, logging_config={"log_level": "WARNING"})
        _deploy(parsed.config, deployment)
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        print(f"Serving on http://{host}:{port} (Ctrl-C ends it)", flush=True)
        signal.pause()
    finally:
        serve.shutdown()
        ray.shutdown()


def _connect(address: str) -> None:
    """Join a cluster; raise ConfigError if there is none."""
    try:
        ray.init(address)
    except (ConnectionError, ValueError) as error:
        raise ConfigError(f"there is no Ray at {address}: {error}") from error


def _check_fits(replicas: int, options: dict[str, float]) -> None:
    """Raise ConfigError if replicas would wait for what this machine does not have."""
    for resource, each in (("CPU", options["num_cpus"]), ("GPU", options["num_gpus"])):
        there = ray.cluster_resources().get(resource, 0)
        if replicas * each > there:
            raise ConfigError(
                f"{replicas} replicas with {each:g} {resource} each do not fit: there are {there:g}"
            )


def _deploy(config: str | None, deployment: dict[str, Any]) -> None:
    """Have Ray run the application as its deployment says, and wait until it does.

    Raises:
        ConfigError: if it cannot.
    """
    args = {"config": str(Path(config).absolute()) if config else None}
    application = {
        "name": NAME,
        "import_path": "server.ray:build",
        "args": args,
        "deployments": [deployment],
    }
    try:
        wanted = ServeDeploySchema.model_validate({"applications": [application]})
    except ValidationError as error:
        raise ConfigError(f"Ray refuses: {error.errors()[0]['msg']}") from error
    # As `serve deploy` does: that wants the dashboard, and serve.run() starts replicas anew where
    # this lets them go on and only tells them what is new.
    client = _get_global_client()
    client.deploy_apps(wanted)
    while (now := serve.status().applications[NAME]).status != ApplicationStatus.RUNNING:
        if now.status == ApplicationStatus.DEPLOY_FAILED:
            # The last line is the error that a replica, or the settings, could not go on with.
            said = [now.message, *(each.message for each in now.deployments.values())]
            raise ConfigError(f"Ray gave up: {said[-1].strip().splitlines()[-1]}")
        time.sleep(0.2)
    client.wait_for_proxies_serving()


if __name__ == "__main__":
    # The module that replicas import, too: what `__main__` defines would have to travel to them.
    sys.exit(import_module("server.ray").main())
