"""The application: models, engine, routes and how they start and stop together."""

import asyncio
import logging
import math
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial

from fastapi import Depends, FastAPI
from fastapi_offline import FastAPIOffline

from adapters import Store
from server.banks import routes as bank_routes
from server.banks.catalogue import Banks
from server.engine.engine import Engine
from server.inference.cache import AnswerCache
from server.models.loading import load_models
from server.models.registry import Registry
from server.observe import tracing
from server.observe.metrics import Metrics
from server.observe.notes import INFERENCE, PROTOCOL_INFERENCE
from server.observe.requests import RequestLog
from server.oip import infer as oip_infer
from server.oip import metadata as oip_metadata
from server.oip.statistics import Statistics
from server.page import routes as page_routes
from server.progress import Progress, Tell, tell_nobody
from server.settings import Settings
from server.v1 import batch, huggingface, infer, models, openai, segment
from server.web import status
from server.web.access import Access, require_api_key, require_known_key
from server.web.fetching import Fetcher
from server.web.middleware import BodyLimit, Budget, RequestId
from server.web.origins import allow_origins
from server.web.problems import add_handlers
from server.web.serving import Serving
from server.web.unread import Unread
from tocom.allocator import keep_freed_memory

logger = logging.getLogger(__name__)

#: Seconds between two lines that say how far the warm-up is.
PROGRESS = 2.0
#: From one rate that the warm-up runs to the next.
STRIDE = 4

#: Bytes of a body that holds no images: a few parameters.
SMALL_BODY = 16 * 1024

DESCRIPTION = """
Classify images with vision transformers at any token-merging rate: 0 is the stock model,
higher rates are cheaper, and a bank of plug-ins makes up for what merging costs.
"""


#: The groups of routes in the description of the interface, in the order of interest.
TAGS = [
    {"name": INFERENCE, "description": "Run a model on images"},
    {"name": "Models and state", "description": "What is served, and how the server is doing"},
    {"name": "Banks", "description": "Change banks while the server runs; needs the admin key"},
    {"name": PROTOCOL_INFERENCE, "description": "Run a model, for clients of Triton and KServe"},
    {"name": oip_metadata.TAG, "description": "What those clients ask of servers and models"},
]


def create_app(settings: Settings, tell: Tell = tell_nobody) -> FastAPI:
    """Load the models and return the application; its engine starts with it.

    Args:
        settings: all of them.
        tell: is told how far loading and warming up have come.

    Raises:
        TocomError: if a model or bank cannot be loaded; nothing has been started then.
    """
    keep_freed_memory()
    registry = Registry(load_models(settings, tell))
    counted = Metrics(registry, settings.slo_ms / 1000)
    engine = Engine(
        max_batch=settings.max_batch,
        max_queue=settings.max_queue,
        max_wait=settings.max_wait_ms / 1000,
        slo=settings.slo_ms / 1000,
        decode_threads=settings.decode_threads,
        share=settings.priority_share,
        keep_places=any(key.priority == "high" for key in settings.api_keys),
        observer=counted,
    )
    provider = tracing.provider(settings)
    budget = Budget(settings.max_inflight_bytes)
    cache = AnswerCache(settings, counted.looked_up) if settings.cache_bytes else None
    serving = Serving(
        settings, registry, engine, counted, budget, started=engine.clock(), cache=cache
    )
    # FastAPI's own documentation page would load its scripts from the network.
    app = FastAPIOffline(
        title="ToCom Serve",
        version="1",
        description=DESCRIPTION,
        openapi_tags=TAGS,
        generate_unique_id_function=lambda route: route.name,
        swagger_ui_parameters={"defaultModelsExpandDepth": 0},  # schemas only if asked for
        redoc_url=None,
        lifespan=_lifespan(serving, tell),
        telemetry=tracing.telemetry(provider),
    )
    app.state.serving = serving
    app.state.access = Access(settings)
    app.state.banks = Banks(registry, Store(settings.store), counted.swapped)
    app.state.statistics = Statistics()
    app.state.fetcher = Fetcher(settings, budget)
    # A description that asks for keys where none are needed would be wrong.
    keys, known = [], []
    if settings.api_keys:
        keys, known = [Depends(require_api_key)], [Depends(require_known_key)]
    for router in (
        infer.router,
        segment.router,
        batch.router,
        openai.router,
        huggingface.router,
        oip_infer.router,
    ):
        app.include_router(router, dependencies=keys)
    app.include_router(oip_metadata.repository, dependencies=known)
    for router in (
        models.router,
        status.router,
        oip_metadata.router,
        bank_routes.router,
        page_routes.router,
    ):
        app.include_router(router)
    add_handlers(app)
    limits = {
        batch.PATH: math.inf,  # a stream of images has no end; each of them has
        bank_routes.PATH: settings.max_bank_bytes,
        **dict.fromkeys(
            (*infer.PATHS, segment.PATH, openai.PATH, huggingface.PATH, oip_infer.PATH),
            settings.max_body_bytes,
        ),
    }
    app.add_middleware(Unread, settings.timeout_ms / 1000)
    app.add_middleware(BodyLimit, serving.budget, SMALL_BODY, limits)
    app.add_middleware(tracing.Attributes)
    app.add_middleware(allow_origins, settings.cors_origins)
    app.add_middleware(RequestLog, metrics=counted)
    app.add_middleware(RequestId)  # the last one added is the first to run
    return app


def _lifespan(
    serving: Serving, tell: Tell
) -> Callable[[FastAPI], AbstractAsyncContextManager[None]]:
    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        serving.engine.start()
        graphs = serving.models.get(None).graphs
        try:
            graphs.start(serving.engine.call, serving.models.measure_again)
            await asyncio.to_thread(warm_up, serving, tell)
            yield
        finally:
            await app.state.fetcher.close()
            await asyncio.to_thread(serving.engine.stop)
            await asyncio.to_thread(graphs.stop)

    return lifespan


def warm_up(serving: Serving, tell: Tell) -> None:
    """Make the deltas of every model's rates, and run it: what is slow at first is slow now.

    It is also how the engine gets to know how long batches take: those of one image and full
    ones, at every fourth rate and where merging begins. Between these it estimates. The setting
    `warmup` may ask for less: rate 0 of each ladder, or nothing.
    """
    sizes = sorted({1, serving.settings.max_batch})
    said = time.monotonic()
    handles = [each for model in serving.models.all() for each in model.ladders]
    for model in handles if serving.settings.warmup != "none" else ():
        # From the highest, whose delta is the dearest one if it cannot be folded for want of room.
        every = range(model.max_rate, -1, -1)
        rates = every if serving.settings.warmup == "all" else every[-1:]
        for done, rate in enumerate(rates):
            progress = Progress(model.name, model.ladder.name, done, len(rates))
            tell(progress)
            if time.monotonic() - said > PROGRESS:
                said = time.monotonic()
                logger.info("%s", progress)
            work = model.at(rate, compensate=True)
            is_run = rate <= 1 or rate in rates[::STRIDE]
            prepare = partial(work.warm_up, sizes) if is_run else work.make_delta
            serving.engine.call(prepare).result()
        # Where batches run, as graphs may already measure there.
        expected = range(1, serving.settings.max_batch + 1)
        serving.engine.call(partial(model.controller.times.settle, every, expected)).result()
        logger.info("%s", Progress(model.name, model.ladder.name, len(rates), len(rates)))
    serving.warm.set()
