"""Traces of requests by OpenTelemetry, if they are asked for.

FastAPI opens a span for every request and continues the trace of a caller who sends a W3C
`traceparent`. Here is decided whether and where they are sent, and what was noted of a request
(what ran and why, how long each stage took) becomes its span's attributes.

Sends no metrics and no logs: there is `/metrics`, and there is stderr.
"""

import os

from fastapi.telemetry import TelemetryConfig
from opentelemetry import trace
from opentelemetry.trace import TracerProvider
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.observe.notes import PROBES, STAGES, notes_of
from server.settings import Settings
from tocom import ConfigError

ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")

#: What may be noted of a request and belongs into its span.
ATTRIBUTES = (
    "model", "ladder", "rate", "reason", "bank_digest", "batch_size", "error", *STAGES.values(),
)  # fmt: skip


def provider(settings: Settings) -> TracerProvider | None:
    """Return what makes and sends spans; None if they are not asked for.

    OpenTelemetry's own variables say where spans go, what is sampled and what the service is
    called. Spans that are not yet sent are sent when the process ends.

    Raises:
        ConfigError: if its SDK is not installed, or another protocol is asked for.
    """
    wanted = settings.otel
    if wanted is None:
        wanted = any(os.environ.get(name) for name in ENDPOINTS)
    if not wanted:
        return None
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk import trace as sdk
        from opentelemetry.sdk.resources import OTELResourceDetector, Resource
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise ConfigError(
            "traces are asked for, and OpenTelemetry's SDK is not installed: "
            "pip install 'tocom-serve[otel]', or set otel = false"
        ) from error
    protocol = next(filter(None, map(os.environ.get, PROTOCOLS)), "http/protobuf")
    if protocol != "http/protobuf":
        raise ConfigError(f"traces are sent by OTLP over http/protobuf, not {protocol!r}")
    named = {"service.name": "tocom-serve", **OTELResourceDetector().detect().attributes}
    made = sdk.TracerProvider(resource=Resource.create(named))
    made.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return made


def telemetry(provider: TracerProvider | None) -> TelemetryConfig:
    """Return what FastAPI is to know; None leaves the provider to who set a global one up."""
    return {
        "tracer_provider": provider,
        # Of dependencies, serialization and the like.
        "operation_spans": False,
        "exclude": lambda scope: scope["path"] in PROBES,
    }


class Attributes:
    """Adds what was noted of a request to its span."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the application."""
        span = trace.get_current_span()
        if scope["type"] != "http" or not span.is_recording():
            await self.app(scope, receive, send)
            return

        async def send_traced(message: Message) -> None:
            # FastAPI ends the span once the last part of the body is sent.
            if message["type"] == "http.response.body" and not message.get("more_body", False):
                notes = notes_of(scope)
                for name in ATTRIBUTES:
                    if notes.get(name) is not None:
                        span.set_attribute(f"tocom.{name}", notes[name])
            await send(message)

        await self.app(scope, receive, send_traced)
