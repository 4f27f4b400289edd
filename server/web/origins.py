"""Which web origins' pages may call the server. Needs no torch."""

from collections.abc import Sequence

from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

from server.web.middleware import REQUEST_ID

#: Says where the JSON of a body of the Open Inference Protocol ends.
JSON_LENGTH = "Inference-Header-Content-Length"
#: Of an answer that is no JSON: what ran, as JSON.
ANSWER = "X-Answer"

#: Of an answer in another interface's words: what ran.
RAN = RATE, REASON, BANK_DIGEST, CACHED = "X-Rate", "X-Reason", "X-Bank-Digest", "X-Cached"

#: Headers that scripts of other origins may send, and read of answers.
SENT = ("Authorization", "Content-Type", "X-API-Key", REQUEST_ID, JSON_LENGTH)
READ = (REQUEST_ID, "Server-Timing", "Retry-After", ANSWER, JSON_LENGTH, *RAN)


def allow_origins(app: ASGIApp, origins: Sequence[str]) -> ASGIApp:
    """Return the application with the headers that let pages of some origins call it.

    Args:
        app: what answers.
        origins: the setting `cors_origins`; empty: no other than the server's own.
    """
    if not origins:
        return app
    return CORSMiddleware(
        app,
        allow_origins=origins,
        allow_methods=("GET", "POST"),
        allow_headers=SENT,
        expose_headers=READ,
    )
