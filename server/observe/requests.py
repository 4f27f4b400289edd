"""One line in the log for each request, and the Server-Timing header.

Addresses are logged without their query and no header is, so that nothing secret gets into a log.

Plain ASGI: starlette's BaseHTTPMiddleware would hide a client's going from the routes.
"""

import logging
import time
from collections.abc import Mapping
from contextlib import nullcontext
from http import HTTPStatus
from typing import Any
from urllib.parse import quote

from opentelemetry import trace
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.observe.metrics import Metrics
from server.observe.notes import INFERENCE, PROBES, PROTOCOL_INFERENCE, STAGES, notes_of

logger = logging.getLogger(__name__)

#: Statuses that refuse a request before it is worked on.
REFUSALS = (HTTPStatus.UNAUTHORIZED, HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE)


class RequestLog:
    """Logs every request once it is over, counts it and tells its client where its time went."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app = app
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the application; inside RequestId, outside of all that may answer."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = time.perf_counter()
        # What the client gets if the application raises.
        status = HTTPStatus.INTERNAL_SERVER_ERROR.value

        async def send_timed(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                timing = _server_timing(notes_of(scope), time.perf_counter() - started)
                MutableHeaders(scope=message)["Server-Timing"] = timing
            await send(message)

        probe = scope["path"] in PROBES
        try:
            with nullcontext() if probe else self.metrics.inflight.track_inprogress():
                await self.app(scope, receive, send_timed)
        finally:
            seconds = time.perf_counter() - started
            self._count(scope, status, seconds)
            _log(scope, status, seconds)

    def _count(self, scope: Scope, status: int, seconds: float) -> None:
        tags = getattr(scope.get("route"), "tags", ())
        if INFERENCE not in tags and PROTOCOL_INFERENCE not in tags:
            return
        notes = notes_of(scope)
        # Refusals are quick: among the answers they would make a full server look like a fast one.
        answered = "inference_ms" in notes and status < HTTPStatus.BAD_REQUEST
        took = seconds if answered else None
        model, ladder = notes.get("model"), notes.get("ladder")
        self.metrics.answered(model, ladder, notes.get("rate"), status, took)
        if status in REFUSALS:
            kind = notes.get("error") or HTTPStatus(status).phrase
            self.metrics.rejected(kind.lower().replace(" ", "_"))


def _server_timing(notes: Mapping[str, Any], seconds: float) -> str:
    times = {stage: notes[name] for stage, name in STAGES.items() if name in notes}
    times["total"] = round(1000 * seconds, 3)
    return ", ".join(f"{stage};dur={time}" for stage, time in times.items())


def _log(scope: Scope, status: int, seconds: float) -> None:
    quiet = scope["path"] in PROBES and status < HTTPStatus.BAD_REQUEST
    level = logging.DEBUG if quiet else logging.INFO
    if not logger.isEnabledFor(level):
        return
    fields = {
        "method": scope["method"],
        # Quoted as it came, so that it is one word again.
        "path": quote(scope["path"])[:200],
        "status": status,
        "duration_ms": round(1000 * seconds, 3),
        "request_id": scope["state"]["request_id"],
        **notes_of(scope),
    }
    context = trace.get_current_span().get_span_context()
    if context.is_valid:
        fields["trace_id"] = trace.format_trace_id(context.trace_id)
    logger.log(level, "%(method)s %(path)s %(status)d", fields)
