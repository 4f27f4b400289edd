"""The server as a Ray Serve deployment: one replica for each device, on one machine or many.

A replica is the whole application with an engine of its own, so that it answers as `tocom-serve`
does; Ray's proxies share requests out among replicas, and Ray starts, checks, replaces and
scales them. Ray's own commands run it: `serve run server.ray:build`, or `serve deploy` with a
file such as deploy/ray.yaml; docs/scaling.md has the rest.

Banks are changed for all replicas at once, in place, by the deployment's `user_config`.
"""

import asyncio
import re
from contextlib import ExitStack
from typing import Annotated, Any, NoReturn

import torch
from fastapi import FastAPI
from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from adapters import Bank, Store
from server.app import create_app
from server.banks.catalogue import Banks
from server.errors import ForbiddenError
from server.observe import log
from server.settings import Settings, load_settings
from server.web.middleware import REQUEST_ID
from tocom import ConfigError

try:
    import ray
    from ray import serve
except ImportError as error:
    raise ImportError("server.ray wants Ray: pip install 'tocom-serve[ray]'") from error

#: Of the one deployment.
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
    """What the application is built from: `args` in a Serve config file, or `serve run`'s."""

    model_config = ConfigDict(extra="forbid")

    config: str | None = Field(
        default=None, description="TOML file with settings, where the application is built"
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

    def _lease(self, bank: Bank | None) -> ExitStack:
        """Keep nothing from being deleted: the replica's own banks do."""
        return ExitStack()


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
            model.name: model.repaired.bank_digest for model in self._serving.models.all()
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
        if ray.is_initialized():
            return int(ray.cluster_resources().get("GPU", 0) > 0)
        # `serve run` with an import path builds first and starts Ray then, on this machine.
        return int(torch.cuda.is_available())
    return int(settings.device == "cuda")
