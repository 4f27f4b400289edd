"""The line and the header that a request leaves behind."""

import io
import json
import logging
import re

import pytest
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from fastapi.testclient import TestClient

from server.app import create_app
from server.errors import QueueFullError
from server.models.registry import Registry
from server.observe.log import JsonFormatter, Seldom, TextFormatter, configure
from server.observe.metrics import Metrics
from server.observe.notes import INFERENCE, PROBES, note
from server.observe.requests import RequestLog
from server.settings import Settings
from server.web.middleware import RequestId

NOTES = {"model": "tiny", "ladder": "tome", "rate": 2, "reason": "load", "batch_size": 4}
TIMES = {"decode_ms": 3.5, "queue_ms": 0.25, "inference_ms": 9.0}


@pytest.fixture
def metrics(served):
    return Metrics(Registry([served]), slo=0.5)


@pytest.fixture
def client(metrics):
    app = FastAPI()

    @app.post("/classify", tags=[INFERENCE])
    async def classify(request: Request, fail: str | None = None) -> str:
        if fail == "full":
            note(request, error="Queue full")
            raise QueueFullError("full")
        if fail:
            raise RuntimeError("a bug")
        note(request, **NOTES, **TIMES)
        return "done"

    @app.get("/readyz")
    async def readyz(fail: bool = False) -> str:
        if fail:
            raise QueueFullError("no")
        return "ready"

    @app.get("/{path:path}")
    async def anything(path: str) -> str:
        return path

    async def full(request, error):
        return JSONResponse({}, status_code=503)

    app.add_exception_handler(QueueFullError, full)
    app.add_middleware(RequestLog, metrics=metrics)
    app.add_middleware(RequestId)
    return TestClient(app, raise_server_exceptions=False)


@pytest.fixture
def written(request):
    """What is logged, in the format of the test's mark or as JSON."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(getattr(request, "param", JsonFormatter)())
    logger = logging.getLogger("server")
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield stream.getvalue
    logger.removeHandler(handler)
    logger.setLevel(before)


as_text = pytest.mark.parametrize("written", [TextFormatter], indirect=True)


def test_a_request_is_one_object(client, written):
    client.post("/classify", headers={"X-Request-Id": "abc"})
    line = json.loads(written())
    assert line.pop("duration_ms") > 0
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00", line.pop("time"))
    assert line == {
        "level": "info",
        "logger": "server.observe.requests",
        "message": "POST /classify 200",
        "method": "POST",
        "path": "/classify",
        "status": 200,
        "request_id": "abc",
        **NOTES,
        **TIMES,
    }


@as_text
def test_a_request_is_one_line(client, written):
    client.post("/classify", headers={"X-Request-Id": "abc"})
    line = re.sub(r"duration_ms=[\d.]+", "duration_ms=1", written())
    assert re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3} INFO ", line)
    assert line.endswith(
        " INFO POST /classify 200 duration_ms=1 request_id=abc model=tiny ladder=tome rate=2 "
        "reason=load batch_size=4 decode_ms=3.5 queue_ms=0.25 inference_ms=9.0\n"
    )


@as_text
def test_what_has_spaces_is_quoted(client, written):
    client.post("/classify?fail=full")
    assert 'error="Queue full"' in written()


@pytest.mark.parametrize("written", [TextFormatter, JsonFormatter], indirect=True)
def test_nothing_secret_is_logged(client, written):
    client.post(
        "/classify?api_key=secret",
        headers={"Authorization": "Bearer secret", "X-API-Key": "secret", "Cookie": "a=secret"},
    )
    assert "secret" not in written()


@pytest.mark.parametrize("written", [TextFormatter, JsonFormatter], indirect=True)
@pytest.mark.parametrize("separator", ["%0a", "%0d", "%C2%85", "%E2%80%A8", "%1b[2J"])
def test_an_address_cannot_begin_a_line(client, written, separator):
    client.get(f"/x{separator}2026-01-01 INFO forged")
    (line,) = written().splitlines()
    assert f"/x{separator.upper().replace('[2J', '%5B2J')}2026-01-01%20INFO%20forged" in line


@as_text
def test_a_message_cannot_begin_a_line(written):
    logging.getLogger("server.x").info("no class %s", "a\nb\x1b[31m\u2028c")
    (line,) = written().splitlines()
    assert line.endswith(r"no class a\nb\x1b[31m\u2028c")


def test_a_long_address_is_cut(client, written):
    client.get("/" + 5000 * "x")
    assert len(json.loads(written())["path"]) == 200


def test_an_exception_is_part_of_its_object(written):
    try:
        raise RuntimeError("a bug")
    except RuntimeError:
        logging.getLogger("server.x").exception("oh")
    line = json.loads(written())
    assert line["message"] == "oh"
    assert "RuntimeError: a bug" in line["exception"]


def test_a_request_that_the_server_fails_on_is_logged_as_such(client, metrics, written):
    client.post("/classify?fail=yes")
    assert json.loads(written())["status"] == 500
    labels = {"model": "", "ladder": "", "rate": "", "code": "500"}
    assert metrics.registry.get_sample_value("tocom_requests_total", labels) == 1


def test_probes_are_logged_where_they_fail(client, written):
    client.get("/readyz")
    assert written() == ""
    client.get("/readyz?fail=true")
    assert json.loads(written())["status"] == 503


def test_probes_are_routes(settings):
    assert set(create_app(settings).openapi()["paths"]) >= PROBES


def test_the_client_is_told_where_its_time_went(client):
    timing = client.post("/classify").headers["server-timing"]
    assert re.fullmatch(
        r"decode;dur=3\.5, queue;dur=0\.25, inference;dur=9\.0, total;dur=[\d.]+", timing
    )
    assert re.fullmatch(r"total;dur=[\d.]+", client.get("/nix").headers["server-timing"])


def test_requests_that_run_no_model_are_not_counted(client, metrics):
    client.get("/nix")
    client.get("/readyz?fail=true")
    names = {sample.name for family in metrics.registry.collect() for sample in family.samples}
    assert "tocom_requests_total" not in names
    assert "tocom_rejected_total" not in names


def test_a_refusal_is_counted_by_its_kind_and_not_timed(client, metrics):
    client.post("/classify")
    client.post("/classify?fail=full")
    value = metrics.registry.get_sample_value
    assert value("tocom_rejected_total", {"reason": "queue_full"}) == 1
    nothing = {"model": "", "ladder": "", "rate": ""}
    assert value("tocom_requests_total", nothing | {"code": "503"}) == 1
    timed = "tocom_request_duration_seconds_count"
    assert value(timed, {"model": "tiny", "ladder": "tome", "rate": "2"}) == 1
    assert value(timed, nothing) is None


@pytest.mark.parametrize(
    ("log_format", "line"),
    [("text", r"[\d-]+ [\d:.]+ WARNING so\n"), ("json", r'\{"time": .+ "message": "so"\}\n')],
)
def test_the_settings_choose_format_and_level(monkeypatch, capsys, log_format, line):
    with monkeypatch.context() as patched:
        # As in a process that has just begun; pytest's own handlers are back at the end.
        patched.setattr(logging.getLogger(), "handlers", [])
        patched.setattr(logging.getLogger("server"), "level", logging.NOTSET)
        configure(Settings(log_format=log_format, log_level="warning"))
        logging.getLogger("server.x").info("not so")
        logging.getLogger("server.x").warning("so")
    assert re.fullmatch(line, capsys.readouterr().err)


def test_what_would_fill_the_log_is_said_seldom():
    seldom = Seldom("socket.accept() out of")

    def passes(message: str, at: float) -> bool:
        record = logging.LogRecord("asyncio", logging.ERROR, "", 0, message, None, None)
        record.created = at
        return bool(seldom.filter(record))

    accept = "socket.accept() out of system resource\nsocket: <socket>"
    assert [passes(accept, at) for at in (100.0, 100.1, 109.9, 110.0, 110.1)] == [
        True, False, False, True, False,
    ]  # fmt: skip
    assert [passes("something else", 100.0)] * 3 == [True] * 3
