"""Answers that are read slowly, not any more, or not at all: as bare ASGI and over connections."""

import asyncio
import http.client
import math
import socket
import threading

import pytest
from starlette.requests import Request
from starlette.responses import Response

from server.app import create_app
from server.observe.notes import notes_of
from server.web.middleware import BodyLimit, Budget
from server.web.unread import PIECE, Unread
from tests.server.conftest import listening
from tests.server.works import PATIENCE

#: Bytes; more than the buffers of a connection hold, by far.
MUCH = 2**25

#: Seconds that no client of a test can keep who does not read.
NO_TIME = 0.001

UPLOAD = {"type": "http.request", "body": bytes(100), "more_body": False}


def scope(method: str = "POST") -> dict:
    return {
        "type": "http",
        "method": method,
        "path": "/docs",
        "query_string": b"",
        "headers": [],
    }


async def receive() -> dict:
    return UPLOAD


def answering(body: bytes):
    """An application that reads a request and answers it."""

    async def app(scope, receive, send) -> None:
        if scope["type"] == "http":
            await Request(scope, receive).body()
            await Response(body)(scope, receive, send)

    return app


def run(app, asked: dict, room: float) -> list[dict]:
    """Return the messages of an answer whose client makes room for so many of them."""
    sent: list[dict] = []

    async def send(message: dict) -> None:
        if len(sent) >= room:
            await asyncio.Event().wait()
        sent.append(message)

    asyncio.run(asyncio.wait_for(app(asked, receive, send), PATIENCE))
    return sent


@pytest.mark.parametrize("size", [0, 1, PIECE, PIECE + 1, 3 * PIECE])
def test_an_answer_is_sent_in_pieces_and_then_its_end(size):
    body = bytes(index % 251 for index in range(size))
    start, *parts, end = run(Unread(answering(body), PATIENCE), scope(), math.inf)
    assert start["status"] == 200
    assert b"".join(part["body"] for part in parts) == body
    assert all(0 < len(part["body"]) <= PIECE and part["more_body"] for part in parts)
    assert (end["body"], end.get("more_body", False)) == (b"", False)


def test_a_small_answer_is_not_copied():
    body = bytes(PIECE)
    assert run(Unread(answering(body), PATIENCE), scope(), math.inf)[1]["body"] is body


def test_what_is_a_stream_is_sent_as_it_comes():
    parts = [bytes(2 * PIECE), b"", b"x"]

    async def app(scope, receive, send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for part in parts:
            await send({"type": "http.response.body", "body": part, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    _, *sent = run(Unread(app, PATIENCE), scope(), math.inf)
    assert [message["body"] for message in sent] == [*parts, b""]


@pytest.mark.parametrize("room", [0, 1, 2, 3])
def test_an_answer_that_is_not_read_is_given_up_without_its_end(room):
    budget, asked = Budget(1000), scope()
    app = BodyLimit(Unread(answering(bytes(2 * PIECE)), NO_TIME), budget, 1000, {})
    sent = run(app, asked, room)
    assert len(sent) == room
    assert all(message.get("more_body", True) for message in sent)
    assert budget.held == 0
    assert notes_of(asked)["error"] == "Answer not read"


def test_who_makes_room_again_and_again_gets_all(monkeypatch):
    """However long the whole takes: here a minute, by a clock that each message puts forward."""
    monkeypatch.setattr("server.web.unread.PIECE", 1)
    sent: list[dict] = []

    async def talk() -> None:
        loop = asyncio.get_running_loop()
        ahead, time = 0.0, loop.time

        async def send(message: dict) -> None:
            nonlocal ahead
            ahead += 1
            await asyncio.sleep(0)
            sent.append(message)

        loop.time = lambda: time() + ahead
        await Unread(answering(bytes(60)), 2)(scope(), receive, send)

    asyncio.run(talk())
    assert len(sent) == 62


def test_a_request_that_is_cancelled_is_not_taken_for_unread():
    async def talk() -> None:
        waits = asyncio.Event()

        async def send(message: dict) -> None:
            waits.set()
            await asyncio.Event().wait()

        task = asyncio.create_task(Unread(answering(b""), PATIENCE)(scope(), receive, send))
        await waits.wait()
        task.cancel()
        await asyncio.wait([task], timeout=PATIENCE)
        assert task.cancelled()

    asyncio.run(talk())


def test_the_server_gives_up_after_its_timeout(settings):
    hurried = settings.model_copy(update={"timeout_ms": 1})
    assert run(create_app(hurried), scope("GET"), room=1)[0]["status"] == 200


def test_a_connection_whose_client_does_not_read_is_closed():
    ended = threading.Event()
    inner = Unread(answering(bytes(MUCH)), NO_TIME)

    async def app(scope, receive, send) -> None:
        await inner(scope, receive, send)
        if scope["type"] == "http":
            ended.set()

    with listening(app) as address, socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**16)
        host, port = address.split(":")
        client.connect((host, int(port)))
        client.settimeout(PATIENCE)
        client.sendall(b"GET / HTTP/1.1\r\nHost: us\r\n\r\n")
        assert ended.wait(PATIENCE)
        got = 0
        while received := client.recv(2**20):
            got += len(received)
    assert 0 < got < MUCH


@pytest.mark.parametrize("size", [10, MUCH])
def test_a_connection_whose_client_reads_is_kept(size):
    with listening(Unread(answering(bytes(size)), PATIENCE)) as address:
        client = http.client.HTTPConnection(address, timeout=PATIENCE)
        client.connect()
        used = client.sock
        for method in ("GET", "HEAD", "GET"):
            client.request(method, "/")
            response = client.getresponse()
            assert len(response.read()) == (size if method == "GET" else 0)
            assert response.headers["content-length"] == str(size)
            assert client.sock is used
        client.close()
