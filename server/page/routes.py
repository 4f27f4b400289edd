"""The page at `/`: a photo, a rate, what comes out and which patches became one token.

Static files that ask the same API as everybody else; all of them come from here, so that the
page works without a network. The sample photographs are the bundled ones.
"""

from pathlib import Path

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response
from starlette.staticfiles import StaticFiles

from tocom.backbones import bundled_folder

FILES = StaticFiles(directory=Path(__file__).parent / "static")
SAMPLES = StaticFiles(directory=bundled_folder("samples"))

HEADERS = {
    # Nothing but our own files, whatever a photo's or a model's name may hold; `blob:` is a
    # photo that was dropped.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self' blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    # The names stay from version to version: ask each time, by ETag.
    "Cache-Control": "no-cache",
}


async def index(request: Request) -> Response:
    """Return the page."""
    return await _send(FILES, "index.html", request)


async def file(request: Request) -> Response:
    """Return one of the page's files."""
    return await _send(FILES, request.path_params["name"], request)


async def sample(request: Request) -> Response:
    """Return a sample photograph, or `LICENSES.md`, which says whose they are."""
    return await _send(SAMPLES, request.path_params["name"], request)


async def _send(files: StaticFiles, name: str, request: Request) -> Response:
    response = await files.get_response(name, request.scope)
    response.headers.update(HEADERS)
    return response


# Starlette's routes, which answer HEAD too and are in no API description.
router = APIRouter()
router.add_route("/", index)
router.add_route("/page/{name}", file)
router.add_route("/page/samples/{name}", sample)
