"""What a server tells of itself: how busy it is, whether it lives, whether it is ready.

What is a state rather than a count (queues, banks, readiness) is read when it is asked for.
"""

from collections import Counter
from collections.abc import Iterator

from fastapi import APIRouter
from fastapi.responses import PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from server.models.served import AutoWork, RateWork
from server.schemas import Health, ModelStatus, Status
from server.web.problems import described
from server.web.serving import Serving, ServingDep

router = APIRouter(tags=["Models and state"])


@router.get("/v1/status", summary="Load of the server")
async def status(serving: ServingDep) -> Status:
    """Tell what the server has to do just now."""
    return describe(serving)


@router.get("/livez", name="livez", summary="Is it alive?", responses=described(503))
@router.get("/healthz", summary="Is it alive?", responses=described(503))
async def healthz(serving: ServingDep) -> Health:
    """Tell whether the server lives: its event loop, which answers this, and its engine."""
    serving.check_alive()
    return Health(status="ok")


@router.get("/readyz", summary="Is it ready?", responses=described(503))
async def readyz(serving: ServingDep) -> Health:
    """Tell whether requests should be sent here: all is warm, and nobody has asked for the end."""
    serving.check_ready()
    return Health(status="ready")


@router.get("/metrics", summary="Metrics for Prometheus", response_class=PlainTextResponse)
def metrics(serving: ServingDep) -> PlainTextResponse:
    """Tell Prometheus what the server counts."""
    text = generate_latest(serving.metrics.registry) + generate_latest(State(serving))
    return PlainTextResponse(text, media_type=CONTENT_TYPE_LATEST)


def describe(serving: Serving) -> Status:
    """Describe what the server has to do just now."""
    load = serving.engine.load()
    queued: Counter[str] = Counter()
    for work, images in load.queued.items():
        assert isinstance(work, RateWork | AutoWork)
        queued[work.model.name] += images
    return Status(
        ready=serving.ready,
        uptime_s=round(serving.engine.clock() - serving.started, 1),
        images_per_second=round(serving.metrics.images_per_second(), 1),
        taken=load.taken,
        queued=queued.total(),
        max_queue=serving.engine.max_queue,
        models=[
            ModelStatus(
                name=model.name,
                queued=queued[model.name],
                auto_rate=model.controller.rate,
                bank_digest=model.repaired.bank_digest,
            )
            for model in serving.models.all()
        ],
    )


class State(Collector):
    """What a server is like at the moment that it is asked."""

    def __init__(self, serving: Serving) -> None:
        self._serving = serving

    def collect(self) -> Iterator[Metric]:
        """Yield queues, banks and readiness."""
        status = describe(self._serving)
        yield GaugeMetricFamily(
            "tocom_ready", "Whether requests should be sent here.", value=status.ready
        )
        yield GaugeMetricFamily(
            "tocom_inflight_images", "Images taken and not yet answered.", value=status.taken
        )
        cache = self._serving.cache
        yield GaugeMetricFamily(
            "tocom_cache_bytes", "Bytes of answers that are kept.", value=cache.held if cache else 0
        )
        depth = GaugeMetricFamily(
            "tocom_queue_depth", "Images that wait for their batch.", labels=["model"]
        )
        info = GaugeMetricFamily(
            "tocom_model_info", "The bank that a model runs with.", labels=["model", "digest"]
        )
        for model in status.models:
            depth.add_metric([model.name], model.queued)
            info.add_metric([model.name, model.bank_digest or ""], 1)
        yield depth
        yield info
