"""The application: models, engine, routes and how they start and stop together."""

import asyncio
import logging
import math
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial

import torch
from fastapi import FastAPI
from fastapi_offline import FastAPIOffline

from server.engine import Engine
from server.middleware import BodyLimit, RequestId
from server.models import ServedModel, load_model
from server.problems import add_handlers
from server.routes import Serving, router
from server.settings import Settings
from tocom import ConfigError

logger = logging.getLogger(__name__)

DESCRIPTION = """
Classify images with vision transformers at any token-merging rate: 0 is the stock model,
higher rates are cheaper, and a bank of plug-ins makes up for what merging costs.
"""


def create_app(settings: Settings) -> FastAPI:
    """Load the models and return the application; its engine starts with it.

    Raises:
        TocomError: if a model or bank cannot be loaded; nothing has been started then.
    """
    engine = Engine(
        max_batch=settings.max_batch,
        max_queue=settings.max_queue,
        max_wait=settings.max_wait_ms / 1000,
        decode_threads=settings.decode_threads,
        threads=settings.threads,
    )
    serving = Serving(settings, _load_models(settings), engine)
    # FastAPI's own documentation page would load its scripts from the network.
    app = FastAPIOffline(
        title="ToCom Serve",
        version="1",
        description=DESCRIPTION,
        redoc_url=None,
        lifespan=_lifespan(serving),
    )
    app.state.serving = serving
    app.include_router(router)
    add_handlers(app)
    app.add_middleware(BodyLimit, max_bytes=settings.max_body_bytes)
    app.add_middleware(RequestId)  # the last one added is the first to run
    return app


def _load_models(settings: Settings) -> Mapping[str, ServedModel]:
    device = settings.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"models cannot run on device {device!r}: {reason}") from error
    return {each.name: load_model(each, device) for each in settings.models}


def _lifespan(serving: Serving) -> Callable[[FastAPI], AbstractAsyncContextManager[None]]:
    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:  # noqa: ARG001
        serving.engine.start()
        try:
            await asyncio.to_thread(_warm_up, serving)
            yield
        finally:
            await asyncio.to_thread(serving.engine.stop)

    return lifespan


def _warm_up(serving: Serving) -> None:
    """Run every model once at its dearest and its cheapest: what is slow at first is slow now."""
    for model in serving.models.values():
        for rate in (0, model.max_rate):
            work = model.at(rate, compensate=True)
            blank = partial(torch.zeros, model.input_size)
            serving.engine.submit(work, blank, deadline=math.inf).result()
        logger.info("model %s is warm: rates 0 to %d", model.name, model.max_rate)
