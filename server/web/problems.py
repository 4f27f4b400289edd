"""Errors as answers: problem+json (RFC 9457), the same for every way to fail.

`error` repeats `detail` for clients of the Open Inference Protocol, which look for it.
"""

import logging
import math
import random
from collections.abc import Callable, Coroutine, Mapping, Sequence
from http import HTTPStatus
from typing import Any, TypeAlias

from fastapi import FastAPI
from fastapi.dependencies.utils import get_flat_params
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from server.errors import ServerError, UnavailableError
from server.observe.notes import note
from server.schemas import Problem
from server.web.middleware import REQUEST_ID
from tocom import TocomError
from tocom.wording import did_you_mean, words_of

logger = logging.getLogger(__name__)

MEDIA_TYPE = "application/problem+json"

#: Makes what clients of another interface look for out of a problem.
Shape: TypeAlias = Callable[[Problem], dict[str, Any]]

#: Title of an error that names no other.
INVALID = "Invalid parameter"

#: What clients are told of an error of ours; the rest is in the log.
OWN_FAULT = "the server failed on this request; its log has the request id"

#: nginx's status for a client that went before its answer; only logs get to see it.
CLIENT_CLOSED_REQUEST = 499


def add_handlers(app: FastAPI) -> None:
    """Make every error that leaves a route, or finds none, a problem."""
    app.add_exception_handler(TocomError, _tocom_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(RequestValidationError, _validation_error)
    app.add_exception_handler(ClientDisconnect, _client_gone)
    app.add_exception_handler(Exception, _own_error)


def described(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Describe problems of a route, for its OpenAPI entry.

    All refer to one schema, which is described since an answer to several images may hold problems.
    The example is short, as there is one for each status of each route.
    """
    return {
        status: {
            "description": HTTPStatus(status).phrase,
            "content": {
                MEDIA_TYPE: {
                    "schema": {"$ref": "#/components/schemas/Problem"},
                    "example": {"status": status, "detail": "..."},
                }
            },
        }
        for status in statuses
    }


def problem(
    request: Request,
    status: int,
    detail: str,
    title: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> JSONResponse:
    """Return an error as an answer.

    Args:
        request: what failed.
        status: HTTP status.
        detail: what was wrong this time and what is allowed.
        title: short name of the kind of error; default: the status's own.
        headers: further headers.
    """
    note(request, error=title or HTTPStatus(status).phrase)
    told = _problem(request, status, detail, title)
    shape: Shape | None = getattr(request.state, "error_shape", None)
    return JSONResponse(
        shape(told) if shape else told.model_dump(),
        status_code=status,
        media_type="application/json" if shape else MEDIA_TYPE,
        headers={**(headers or {}), REQUEST_ID: request.state.request_id},
    )


def speaking(shape: Shape) -> type[APIRoute]:
    """Return the class of routes whose errors, refused keys included, have a shape of their own."""

    class Speaking(APIRoute):
        def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
            handle = super().get_route_handler()

            async def handle_speaking(request: Request) -> Response:
                request.state.error_shape = shape
                return await handle(request)

            return handle_speaking

    return Speaking


def problem_of(request: Request, error: BaseException) -> Problem:
    """Describe an error that is one part of an answer; an unforeseen one is logged."""
    if not isinstance(error, TocomError):
        logger.error("a part of request %s failed", request.state.request_id, exc_info=error)
        return _problem(request, 500, OWN_FAULT, None)
    status, title = (
        (error.status, error.title) if isinstance(error, ServerError) else (422, INVALID)
    )
    return _problem(request, status, str(error), title)


def _problem(request: Request, status: int, detail: str, title: str | None) -> Problem:
    return Problem(
        type=f"urn:tocom:{title.lower().replace(' ', '-')}" if title else "about:blank",
        title=title or HTTPStatus(status).phrase,
        status=status,
        detail=detail,
        instance=request.url.path,
        error=detail,
        request_id=request.state.request_id,
    )


async def _tocom_error(request: Request, error: Exception) -> JSONResponse:
    if not isinstance(error, ServerError):
        return problem(request, 422, str(error), INVALID)
    headers = dict(error.headers)
    if isinstance(error, UnavailableError):
        # Spread out, so that those refused together do not come back together.
        seconds = error.retry_after * random.uniform(1, 1.5)
        headers["Retry-After"] = str(max(1, math.ceil(seconds)))
    return problem(request, error.status, str(error), error.title, headers)


async def _http_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    detail = error.detail
    if error.status_code == HTTPStatus.NOT_FOUND:
        detail = f"there is nothing at {request.url.path}; /docs says what there is"
    elif error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
        allowed = (error.headers or {}).get("Allow", "another method")
        detail = f"{request.url.path} takes {allowed}, not {request.method}"
    return problem(request, error.status_code, detail, headers=error.headers)


async def _validation_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    known = [field.alias for field in get_flat_params(request.scope["route"].dependant)]
    detail = "; ".join(_describe(fault, known) for fault in error.errors())
    return problem(request, 422, detail, INVALID)


def _describe(fault: Mapping[str, Any], known: Sequence[str]) -> str:
    name = ".".join(str(part) for part in fault["loc"][1:])
    if fault["type"] == "extra_forbidden":
        meant = did_you_mean(name, known) or "; /docs says which there are"
        return f"there is no parameter {name!r}{meant}"
    return f"{name}: {words_of(fault)}, got {str(fault['input'])[:40]!r}"


async def _client_gone(request: Request, error: Exception) -> JSONResponse:  # noqa: ARG001
    detail = "the client closed the connection before its answer"
    return problem(request, CLIENT_CLOSED_REQUEST, detail, "Client closed request")


async def _own_error(request: Request, error: Exception) -> JSONResponse:
    logger.error("request %s failed: %r", request.state.request_id, error)
    return problem(request, 500, OWN_FAULT)
