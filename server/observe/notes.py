"""What only its route knows of a request: which rate ran, how long it waited.

The route notes it; all notes end in the line of the log, and some in headers, metrics and traces.
"""

from typing import Any

from starlette.requests import Request
from starlette.types import Scope

#: Tags of the routes whose requests are counted: those that run a model.
INFERENCE = "Inference"
PROTOCOL_INFERENCE = "Open Inference Protocol"

#: What is asked every few seconds for ever, and of interest only where it fails.
PROBES = frozenset(
    (
        "/healthz",
        "/livez",
        "/metrics",
        "/readyz",
        "/v1/status",
        "/v2/health/live",
        "/v2/health/ready",
    )
)

#: Times that a route may note, in milliseconds, as Server-Timing and traces call them.
STAGES = {"decode": "decode_ms", "queue": "queue_ms", "inference": "inference_ms"}


def note(request: Request, **notes: str | float | None) -> None:
    """Note something about a request.

    Args:
        request: the request.
        notes: any, for the log line. Of use beyond it are `model`, `ladder`, `rate`,
            `reason`, `bank_digest`, `batch_size`, the times of STAGES and `error`, the kind of a
            problem.
    """
    notes_of(request.scope).update(notes)


def notes_of(scope: Scope) -> dict[str, Any]:
    """Return what was noted about a request so far."""
    notes: dict[str, Any] = scope.setdefault("state", {}).setdefault("answer_notes", {})
    return notes
