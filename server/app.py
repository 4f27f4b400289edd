"""The application: models, engine, routes and how they start and stop together."""

import asyncio
import logging
import math
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial

import torch
from fastapi import Depends, FastAPI
from fastapi_offline import FastAPIOffline

from adapters import Store
from server.banks import routes as bank_routes
from server.banks.catalogue import Banks
from server.engine.engine import Engine
from server.engine.threads import set_torch_threads
from server.models.registry import Registry
from server.models.served import load_models
from server.observe import metrics, tracing
from server.observe.log import RequestLog
from server.observe.metrics import Metrics
from server.oip import routes as oip
from server.oip.statistics import Statistics
from server.page import routes as page
from server.settings import Settings
from server.v1 import batch as batches
from server.v1 import classify, embed
from server.v1 import models as routes
from server.web.access import Access, require_api_key
from server.web.middleware import BodyLimit, RequestId
from server.web.problems import add_handlers
from server.web.serving import Serving
from tocom.allocator import keep_freed_memory

logger = logging.getLogger(__name__)

#: Seconds between two lines that say how far the warm-up is.
PROGRESS = 2.0
#: From one rate that the warm-up runs to the next.
STRIDE = 4

DESCRIPTION = """
Classify images with vision transformers at any token-merging rate: 0 is the stock model,
higher rates are cheaper, and a bank of plug-ins makes up for what merging costs.
"""


def create_app(settings: Settings) -> FastAPI:
    """Load the models and return the application; its engine starts with it.

    From here on one torch thread is all that the process's threads get, but for the engine's
    worker. OpenMP's threads wait awake for their next operation, of which a forward has hundreds,
    only as long as all that it ever started have a core each: a second team, however idle, makes
    them sleep in between, and a forward take up to twice as long.

    Raises:
        TocomError: if a model or bank cannot be loaded; nothing has been started then.
    """
    keep_freed_memory()
    threads = settings.threads or torch.get_num_threads()
    set_torch_threads(1)
    models = Registry(load_models(settings))
    counted = Metrics(models, settings.slo_ms / 1000)
    engine = Engine(
        max_batch=settings.max_batch,
        max_queue=settings.max_queue,
        max_wait=settings.max_wait_ms / 1000,
        slo=settings.slo_ms / 1000,
        decode_threads=settings.decode_threads,
        threads=threads,
        observer=counted,
    )
    provider = tracing.provider(settings)
    serving = Serving(settings, models, engine, counted, started=engine.clock())
    # FastAPI's own documentation page would load its scripts from the network.
    app = FastAPIOffline(
        title="ToCom Serve",
        version="1",
        description=DESCRIPTION,
        redoc_url=None,
        lifespan=_lifespan(serving, threads),
        telemetry=tracing.telemetry(provider),
    )
    app.state.serving = serving
    app.state.access = Access(settings)
    app.state.banks = Banks(models, Store(settings.store), counted.swapped)
    app.state.statistics = Statistics()
    # A description that asks for keys where none are needed would be wrong.
    keys = [Depends(require_api_key)] if settings.api_keys else []
    for router in (classify.router, batches.router, embed.router, oip.inference):
        app.include_router(router, dependencies=keys)
    for router in (routes.router, oip.router, bank_routes.router, metrics.router, page.router):
        app.include_router(router)
    add_handlers(app)
    # A stream of images has no end; each of them has.
    limits = {batches.PATH: math.inf, bank_routes.PATH: settings.max_bank_bytes}
    app.add_middleware(BodyLimit, settings.max_body_bytes, by_path=limits)
    app.add_middleware(tracing.Attributes)
    app.add_middleware(RequestLog, metrics=counted)
    app.add_middleware(RequestId)  # the last one added is the first to run
    return app


def _lifespan(
    serving: Serving, threads: int
) -> Callable[[FastAPI], AbstractAsyncContextManager[None]]:
    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:  # noqa: ARG001
        serving.engine.start()
        serving.models.get(None).graphs.start(serving.engine.call, threads)
        try:
            await asyncio.to_thread(warm_up, serving)
            yield
        finally:
            await asyncio.to_thread(serving.engine.stop)

    return lifespan


def warm_up(serving: Serving) -> None:
    """Make the deltas of every model's rates, and run it: what is slow at first is slow now.

    It is also how the engine gets to know how long batches take: those of one image and full
    ones, at every fourth rate and where merging begins. Between these it estimates.
    """
    sizes = sorted({1, serving.settings.max_batch})
    said = time.monotonic()
    for model in serving.models.all():
        # From the highest, whose delta is the dearest one if it cannot be folded for want of room.
        rates = range(model.max_rate, -1, -1)
        for done, rate in enumerate(rates, start=1):
            if serving.stopping.is_set():
                return
            work = model.at(rate, compensate=True)
            is_run = rate <= 1 or rate in rates[::STRIDE]
            prepare = partial(work.warm_up, sizes) if is_run else work.make_delta
            serving.engine.call(prepare).result()
            if time.monotonic() - said > PROGRESS:
                said = time.monotonic()
                logger.info("model %s: %d of %d rates are warm", model.name, done, len(rates))
        # Where batches run, as graphs may already measure there.
        serving.engine.call(partial(model.controller.times.settle, rates, sizes)).result()
        logger.info("model %s is warm: rates 0 to %d", model.name, model.max_rate)
    serving.warm.set()
