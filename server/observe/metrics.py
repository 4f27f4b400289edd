"""What the server counts, for Prometheus.

The engine tells what happened to images, the request log what became of requests. No label comes
from outside: a model is one that is served, a ladder one of its own, a rate one that it runs at.

Does not name clients or images.
"""

import time
from collections.abc import Callable, Sequence
from functools import partial

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from server.engine.times import Flow
from server.engine.work import Runnable, Work
from server.models.registry import Registry
from server.models.served import RateWork

# A second series for each counter and histogram, to say when it began, helps nobody.
prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.015, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)
IMAGES = (1, 2, 4, 8, 16, 32, 64)
RATES = (0, 1, 2, 4, 6, 8, 10, 12, 14, 16, 20, 24, 32, 48)

#: What says at which rate something ran, and of what.
LABELS = ["model", "ladder", "rate"]

#: Seconds over which images a second are counted.
WINDOW = 10.0


class Metrics:
    """The counters of one server; an Observer of its engine. Any thread may call it."""

    def __init__(
        self, models: Registry, slo: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Begin at zero.

        Args:
            models: those that are served.
            slo: seconds within which answers are wanted; becomes a bound of the histograms.
            clock: tells seconds.
        """
        self._models = models
        self._clock = clock
        self._recent = Flow()
        self.registry = CollectorRegistry()
        # What the process uses; nothing on systems without /proc.
        prometheus_client.ProcessCollector(registry=self.registry)
        prometheus_client.GCCollector(registry=self.registry)
        prometheus_client.PlatformCollector(registry=self.registry)
        counter = partial(Counter, namespace="tocom", registry=self.registry)
        seconds = partial(
            Histogram,
            namespace="tocom",
            registry=self.registry,
            buckets=sorted({*SECONDS, slo}),
        )
        self._requests = counter("requests", "Requests for inference.", [*LABELS, "code"])
        self._durations = seconds(
            "request_duration_seconds",
            "From a request's headers to its answer.",
            LABELS,
        )
        self.inflight = Gauge(
            "inflight_requests",
            "Requests that are being answered.",
            namespace="tocom",
            registry=self.registry,
        )
        self._rejected = counter("rejected", "Requests that were refused unread.", ["reason"])
        self._images = counter("images", "Images that ran.", LABELS)
        self._tokens = counter(
            "tokens", "Tokens that entered a block, of all blocks and images.", ["model", "ladder"]
        )
        self._auto = Histogram(
            "auto_rate",
            "Rate at which images ran whose rate was left to the server.",
            ["model", "ladder"],
            namespace="tocom",
            registry=self.registry,
            buckets=RATES,
        )
        self._decisions = counter("rate_decisions", "Batches with rate=auto.", ["reason"])
        self._cascades = counter(
            "cascade_images",
            "Images answered by a cascade, by the rate of their last run and why it was that.",
            [*LABELS, "reason"],
        )
        self._runs = counter("cascade_runs", "Runs of images of cascades.", LABELS)
        self._queued = seconds("queue_duration_seconds", "What an image waited for its batch.")
        self._stages = seconds(
            "stage_duration_seconds", "Decoding of an image, inference of a batch.", ["stage"]
        )
        self._batches = Histogram(
            "batch_size",
            "Images that ran together.",
            namespace="tocom",
            registry=self.registry,
            buckets=IMAGES,
        )
        self._missed = counter("deadline_missed", "Images whose deadline passed.", ["stage"])
        self._failed = counter("failed", "Images that could not be answered.", ["stage"])
        self._cancelled = counter("cancelled", "Images that their client gave up.")
        self._lookups = counter("cache_lookups", "Images looked up in the cache.", ["result"])
        self._swaps = counter("swaps", "Changes of a model's bank.", ["result"])
        self._begin_at_zero()

    def _begin_at_zero(self) -> None:
        # A series that begins with its first event hides that event from rate().
        for stage in ("decode", "queue", "inference"):
            self._missed.labels(stage)
        for stage in ("decode", "inference"):
            self._failed.labels(stage)
            self._stages.labels(stage)
        for reason in ("quality", "deadline", "backlog", "load", "cooling", "slack"):
            self._decisions.labels(reason)
        for result in ("hit", "miss"):
            self._lookups.labels(result)
        for result in ("ok", "failed"):
            self._swaps.labels(result)
        for model in self._models.all():
            for each in model.ladders:
                self._auto.labels(each.name, each.ladder.name)
                self._tokens.labels(each.name, each.ladder.name)

    def decoded(self, work: Work, seconds: float) -> None:
        """Count an image that was prepared."""
        self._stages.labels("decode").observe(seconds)

    def ran(
        self,
        work: Runnable,
        reason: str,
        shape: tuple[int, ...],
        seconds: float,
        queued: Sequence[float],
    ) -> None:
        """Count a batch."""
        assert isinstance(work, RateWork)
        model = work.model.name, work.model.ladder.name
        images, _, height, width = shape
        self._recent.add(images, self._clock(), WINDOW)
        self._batches.observe(images)
        self._stages.labels("inference").observe(seconds)
        self._images.labels(*model, work.rate).inc(images)
        self._tokens.labels(*model).inc(images * work.model.tokens(work.rate, (height, width)))
        for waited in queued:
            self._queued.observe(waited)
        if reason != "asked":
            self._decisions.labels(reason).inc()
            for _ in range(images):
                self._auto.labels(*model).observe(work.rate)

    def passed(self, works: Sequence[Runnable], reason: str) -> None:
        """Count an image that a cascade has answered, and its runs."""
        for work in works:
            assert isinstance(work, RateWork)
            run = work.model.name, work.model.ladder.name, work.rate
            self._runs.labels(*run).inc()
        self._cascades.labels(*run, reason).inc()

    def failed(self, work: Work, stage: str) -> None:
        """Count an image whose decoding or inference raised."""
        self._failed.labels(stage).inc()

    def missed(self, work: Work, stage: str) -> None:
        """Count an image whose deadline passed."""
        self._missed.labels(stage).inc()

    def cancelled(self, work: Work) -> None:
        """Count an image that was given up."""
        self._cancelled.inc()

    def answered(
        self,
        model: str | None,
        ladder: str | None,
        rate: int | str | None,
        code: int,
        seconds: float | None,
    ) -> None:
        """Count a request for inference.

        Args:
            model: its name; None: the request did not come that far.
            ladder: the name of the model's ladder that it ran, or was to run, on.
            rate: that ran; what was asked for, or None, if nothing did.
            code: HTTP status of the answer.
            seconds: that it took; None if that tells nothing, as of a refusal or a long stream.
        """
        handles = [each for served in self._models.all() for each in served.ladders]
        highest = {(each.name, each.ladder.name): each.max_rate for each in handles}
        if model is None or ladder is None or (model, ladder) not in highest:
            model, ladder, rate = "", "", ""
        elif str(rate) not in {"auto", "cascade", *map(str, range(highest[model, ladder] + 1))}:
            rate = ""
        self._requests.labels(model, ladder, rate, code).inc()
        if seconds is not None:
            self._durations.labels(model, ladder, rate).observe(seconds)

    def rejected(self, reason: str) -> None:
        """Count a request that was refused; `reason` is one of a few."""
        self._rejected.labels(reason).inc()

    def looked_up(self, hits: int, misses: int) -> None:
        """Count images whose answers were looked up in the cache."""
        self._lookups.labels("hit").inc(hits)
        self._lookups.labels("miss").inc(misses)

    def swapped(self, result: str) -> None:
        """Count a change of a model's bank: `ok` or `failed`."""
        self._swaps.labels(result).inc()

    def images_per_second(self) -> float:
        """Return how many images ran a second, of late."""
        return self._recent.rate(self._clock(), WINDOW)
