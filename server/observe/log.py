"""One line for each request, as text or JSON, and the Server-Timing header.

What only its route knows of a request (which rate ran, how long it waited) the route notes; all
notes end in the line, and some in the header, the metrics and the trace. Addresses are logged
without their query and no header is, so that nothing secret gets into a log.

Plain ASGI: starlette's BaseHTTPMiddleware would hide a client's going from the routes.
"""

import json
import logging
import re
import time
from collections.abc import Mapping
from contextlib import nullcontext
from datetime import datetime, timezone
from http import HTTPStatus
from typing import Any
from urllib.parse import quote

from opentelemetry import trace
from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.observe.metrics import Metrics
from server.settings import Settings

logger = logging.getLogger(__name__)

#: Tag of the routes whose requests are counted: those that run a model.
INFERENCE = "inference"

#: What is asked every few seconds for ever, and of interest only where it fails.
PROBES = frozenset(
    ("/healthz", "/metrics", "/readyz", "/v1/status", "/v2/health/live", "/v2/health/ready")
)

#: Statuses that refuse a request before it is worked on.
REFUSALS = (HTTPStatus.UNAUTHORIZED, HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE)

#: Times that a route may note, in milliseconds, as Server-Timing and traces call them.
STAGES = {"decode": "decode_ms", "queue": "queue_ms", "inference": "inference_ms"}

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
_PLAIN = re.compile(r"[\w.:/-]+")


def configure(settings: Settings) -> None:
    """Log to stderr, from `log_level` on, in `log_format`; leave alone what is set up already."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter() if settings.log_format == "json" else TextFormatter())
    logging.basicConfig(handlers=[handler])
    # Ours alone: the libraries' own notes are of no use to who only serves.
    logging.getLogger("server").setLevel(settings.log_level.upper())


def note(request: Request, **notes: str | float | None) -> None:
    """Note something about a request.

    Args:
        request: the request.
        notes: any, for the log line. Of use beyond it are `model`, `rate`, `reason`,
            `bank_digest`, `batch_size`, the times of STAGES and `error`, the kind of a problem.
    """
    notes_of(request.scope).update(notes)


def notes_of(scope: Scope) -> dict[str, Any]:
    """Return what was noted about a request so far."""
    notes: dict[str, Any] = scope.setdefault("state", {}).setdefault("answer_notes", {})
    return notes


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
        if INFERENCE not in getattr(scope.get("route"), "tags", ()):
            return
        notes = notes_of(scope)
        # Refusals are quick: among the answers they would make a full server look like a fast one.
        took = seconds if "inference_ms" in notes else None
        self.metrics.answered(notes.get("model"), notes.get("rate"), status, took)
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


class TextFormatter(logging.Formatter):
    """A line for people: time, level, message, then the arguments that the message leaves out."""

    default_msec_format = "%s.%03d"

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        """Return the line of a record, and no other: what it quotes cannot begin a second one."""
        more = [
            f"{name}={_word(value)}"
            for name, value in _fields(record).items()
            if f"%({name})" not in str(record.msg)
        ]
        record.message = " ".join([record.message.rstrip(), *more])
        return _CONTROL.sub(_escaped, super().formatMessage(record))


class JsonFormatter(logging.Formatter):
    """A line for programs: an object with time, level, logger and message, and the arguments."""

    def format(self, record: logging.LogRecord) -> str:
        """Return a record as JSON."""
        line = {
            "time": datetime.fromtimestamp(record.created, timezone.utc).isoformat(
                timespec="milliseconds"
            ),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **_fields(record),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def _fields(record: logging.LogRecord) -> dict[str, object]:
    """Return the arguments of a record that has them by name."""
    if not isinstance(record.args, Mapping):
        return {}
    return {name: value for name, value in record.args.items() if value is not None}


def _word(value: object) -> str:
    text = str(value)
    return text if _PLAIN.fullmatch(text) else json.dumps(text)


def _escaped(control: re.Match[str]) -> str:
    return control[0].encode("unicode_escape").decode("ascii")
