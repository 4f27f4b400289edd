import asyncio
import json

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from server.app import create_app
from server.errors import UnavailableError
from server.settings import ApiKey
from server.v1.batch import PATH
from server.web.middleware import Budget
from tests.server.conftest import call, problem

BODY = {"type": "http.request", "body": b"image", "more_body": False}


@pytest.fixture
def app(settings):
    return create_app(settings)


@pytest.mark.parametrize("size", ["1048577", "9" * 30, "9" * 5000])
def test_a_body_that_says_it_is_too_large_is_not_read(app, size):
    status, body, unread = call(app, BODY, headers=[("Content-Length", size)])
    assert status == 413
    assert body["detail"] == "the request body is larger than the 1,048,576 bytes that are allowed"
    assert unread == [BODY]


@pytest.mark.parametrize("length", ["-5", "many", "²"])
def test_a_length_that_is_no_number_is_counted(app, length):
    body = {"type": "http.request", "body": bytes(2**20 + 1), "more_body": False}
    status, _, unread = call(app, body, headers=[("Content-Length", length)])
    assert status == 413
    assert unread == []


@pytest.mark.parametrize("request_id", ["abc", "0b6c9a58-2f4e:1", "x" * 128])
def test_a_request_id_is_echoed(client, photo, request_id):
    answer = client.post(
        "/v1/classify", files={"file": photo}, headers={"X-Request-Id": request_id}
    )
    assert answer.headers["x-request-id"] == request_id
    assert answer.json()["request_id"] == request_id


@pytest.mark.parametrize("request_id", ["", "a b", "<script>", "x" * 129])
def test_a_request_id_that_is_not_plain_is_replaced(client, request_id):
    answer = client.get("/nix", headers={"X-Request-Id": request_id})
    assert len(answer.headers["x-request-id"]) == 32
    problem(answer)


def test_without_a_request_id_each_request_gets_its_own(client):
    first, second = (client.get("/healthz").headers["x-request-id"] for _ in range(2))
    assert len(first) == 32
    assert first != second


def test_a_request_with_two_lengths_is_refused(app):
    headers = [("Content-Length", "5"), ("Transfer-Encoding", "chunked")]
    status, body, unread = call(app, BODY, headers=headers)
    assert status == 400
    assert "not both" in body["detail"]
    assert unread == [BODY]


def test_a_budget_is_not_overdrawn():
    budget = Budget(10)
    budget.take(6)
    with pytest.raises(UnavailableError, match="hold 6 of the 10 bytes"):
        budget.take(5)
    budget.release(6)
    budget.take(10)


def test_streams_have_half_of_a_budget_unless_there_is_just_one():
    budget = Budget(10)
    refused = pytest.raises(UnavailableError, match="hold 6 of the 5 bytes")
    with budget.streaming(6), refused, budget.streaming(1):
        pass
    with budget.streaming(2), budget.streaming(3):
        budget.take(5)
    with pytest.raises(UnavailableError, match="hold 5 of the 10 bytes"), budget.streaming(6):
        pass
    with budget.streaming(5):
        assert budget.held == 10
    assert budget.held == 5


async def begin(app, path: str, sent: bytes, kind: str) -> tuple[asyncio.Task, asyncio.Queue, list]:
    """Send a part of a request's body and wait until it is read."""
    to_read: asyncio.Queue = asyncio.Queue()
    answered: list[dict] = []
    read = asyncio.Event()

    async def receive() -> dict:
        if to_read.empty():
            read.set()
        return await to_read.get()

    async def send(message: dict) -> None:
        answered.append(message)

    scope = {
        "type": "http",
        "method": "POST",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "headers": [(b"content-type", kind.encode())],
    }
    to_read.put_nowait({"type": "http.request", "body": sent, "more_body": True})
    task = asyncio.create_task(app(scope, receive, send))
    waiting = asyncio.create_task(read.wait())
    await asyncio.wait([task, waiting], return_when=asyncio.FIRST_COMPLETED)
    waiting.cancel()
    return task, to_read, answered


@pytest.mark.parametrize(
    "path",
    [
        "/v1/classify",
        "/v1/embed",
        "/v1/embeddings",
        "/models/tiny",
        "/v2/models/tiny/infer",
        "/v2/models/tiny/versions/1/infer",
    ],
)
def test_slow_uploads_hold_no_more_bytes_than_there_is_room_for(settings, path):
    size = 2**20
    app = create_app(settings.model_copy(update={"max_inflight_bytes": 4 * size}))
    budget = app.state.serving.budget
    kind = "application/json" if path == "/v1/embeddings" else "image/png"

    async def run() -> tuple[list[int], int]:
        begun = [await begin(app, path, bytes(size), kind) for _ in range(6)]
        most = budget.held
        for _, to_read, _ in begun:
            to_read.put_nowait({"type": "http.disconnect"})
        await asyncio.wait_for(asyncio.gather(*(task for task, *_ in begun)), 60)
        return [answered[0]["status"] for *_, answered in begun], most

    statuses, most = asyncio.run(run())
    assert sorted(statuses) == [499] * 4 + [503] * 2
    assert most == 4 * size
    assert budget.held == 0


def test_a_stream_reserves_what_it_may_hold(settings):
    app = create_app(settings.model_copy(update={"max_inflight_bytes": 9 * 2**20}))
    budget = app.state.serving.budget

    async def run() -> list[dict]:
        streams = [await begin(app, PATH, b'{"b64', "application/x-ndjson") for _ in range(3)]
        assert budget.held == 4 * 2**20
        for _, to_read, _ in streams:
            to_read.put_nowait({"type": "http.disconnect"})
        await asyncio.wait_for(asyncio.gather(*(task for task, *_ in streams)), 60)
        return streams[2][2]

    refused = asyncio.run(run())
    assert refused[0]["status"] == 503
    detail = json.loads(refused[1]["body"])["detail"]
    assert detail == (
        "streams of images hold 4,194,304 of the 4,718,592 bytes that they may have together"
    )
    assert budget.held == 0


ROUTES = [
    ("POST", "/v1/classify"),
    ("POST", "/v1/embed"),
    ("POST", PATH),
    ("POST", "/v1/segment"),
    ("POST", "/v1/embeddings"),
    ("POST", "/models/tiny"),
    ("POST", "/v2/models/tiny/infer"),
    ("POST", "/v2/repository/index"),
    ("POST", "/v2/repository/models/tiny/load"),
    ("POST", "/v2/repository/models/tiny/unload"),
    ("POST", "/v1/banks"),
    ("PUT", "/v1/models/tiny/bank"),
    ("DELETE", "/v1/models/tiny/bank"),
    ("DELETE", "/v1/banks/x"),
]


def test_without_a_key_no_body_is_read(settings):
    keys = (ApiKey(name="one", key="k" * 16),)
    app = create_app(settings.model_copy(update={"api_keys": keys, "admin_key": keys[0].key}))
    changing = {
        (method.upper(), path)
        for path, methods in app.openapi()["paths"].items()
        for method in methods
        if method != "get"
    }
    assert len(ROUTES) == len(changing)
    endless = {"type": "http.request", "body": bytes(2**16), "more_body": True}
    for method, path in ROUTES:
        status, _, unread = call(app, endless, path=path, method=method)
        assert (path, status, unread) == (path, 401, [endless])


def test_a_body_of_parameters_is_small(settings):
    key = ApiKey(name="one", key="k" * 16).key
    app = create_app(settings.model_copy(update={"admin_key": key}))
    large = {"type": "http.request", "body": b"[" * 2**15, "more_body": True}
    headers = [("X-API-Key", "k" * 16)]
    path = "/v1/models/tiny/bank"
    status, body, _ = call(app, large, path=path, method="PUT", headers=headers)
    assert status == 413
    assert "16,384 bytes" in body["detail"]


def test_a_prefix_of_the_address_changes_no_limit(settings, photo):
    outer = FastAPI()
    app = create_app(settings)
    outer.mount("/vision", app)
    body = photo + bytes(2**15)  # what follows a picture is ignored
    with TestClient(app), TestClient(outer) as client:
        assert client.post("/vision/v1/classify", content=body).status_code == 200
