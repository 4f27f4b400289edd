"""Streams whose clients need not do what is good for them: over connections and as bare ASGI."""

import base64
import json
import logging
import socket
import threading

import anyio
import httpx
import pytest

from server.app import create_app
from server.settings import ApiKey
from server.v1.batch import PATH
from server.web.ahead import AHEAD
from tests.server.conftest import listening, picture, png
from tests.server.v1.conversation import Conversation, converse, settle
from tests.server.works import PATIENCE, Exact, submit_one

#: A small image with the longest name, most of what is told of it.
LINE = (
    json.dumps({"name": "n" * 4096, "b64": base64.b64encode(png(picture(0))).decode()}).encode()
    + b"\n"
)

#: Bytes; more than what is kept for a client and the buffers of its connection hold, by far.
MUCH = 2**28

HEAD = (
    f"POST {PATH} HTTP/1.1\r\nHost: us\r\nContent-Type: application/x-ndjson\r\n"
    f"Content-Length: {MUCH}\r\n\r\n"
)

KEY = "k" * 16


def test_a_client_that_never_reads_is_read_no_further_and_holds_nobody_up(settings, photo):
    with (
        listening(create_app(settings)) as address,
        httpx.Client(base_url=f"http://{address}", timeout=PATIENCE) as other,
        socket.socket() as client,
    ):
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**16)
        host, port = address.split(":")
        client.connect((host, int(port)))
        client.sendall(HEAD.encode())
        client.setblocking(False)
        sent, rest, answered = 0, LINE, 0
        # Until nothing of it is taken while twenty requests of another client are answered.
        while answered < 20:
            if taken := offer(client, rest):
                sent, rest, answered = sent + taken, rest[taken:] or LINE, 0
                assert sent < MUCH / 2
            else:
                assert other.post("/v1/classify", files={"file": photo}).status_code == 200
                answered += 1


def offer(client: socket.socket, data: bytes) -> int:
    """Send what is taken at once; returns how much that was."""
    try:
        return client.send(data)
    except BlockingIOError:
        return 0


@pytest.fixture
def hurried(settings, monkeypatch):
    """Settings that give a client no time to take its answers, and any to send its images."""
    monkeypatch.setattr("server.v1.stream.fail_after", lambda _: anyio.fail_after(None))
    return settings.model_copy(update={"timeout_ms": 1})


def check_given_up(app, taken: int) -> None:
    """Check that nothing is held for a batch, and that the engine has as much as without it."""
    assert app.state.serving.budget.held == 0
    assert app.state.serving.engine.load().taken == taken


def test_a_client_that_never_reads_is_given_up(hurried, caplog):
    async def talk(app):
        batch = Conversation(app)
        batch.listening.clear()
        batch.say(LINE)
        await batch.task
        check_given_up(app, taken=0)

    converse(create_app(hurried), talk)
    assert not [each for each in caplog.records if each.levelno >= logging.ERROR]


def test_a_client_that_stops_reading_is_given_up(hurried, caplog):
    async def talk(app):
        engine, go = app.state.serving.engine, threading.Event()
        batch = Conversation(app)
        batch.say(LINE)
        assert (await batch.hear())["result"]
        batch.listening.clear()
        blockers = [submit_one(engine, Exact(), go.wait, float("inf")) for _ in range(2)]
        try:
            batch.say(LINE)  # waits behind them
            batch.say(b"broken\n")
            await batch.task
            check_given_up(app, taken=2)
        finally:
            go.set()
        assert all(blocker.exception(60) for blocker in blockers)

    converse(create_app(hurried), talk)
    assert not [each for each in caplog.records if each.levelno >= logging.ERROR]


def test_a_client_that_takes_a_line_in_time_gets_the_next(settings):
    async def talk(app):
        batch = Conversation(app)
        batch.listening.clear()
        batch.say(2 * LINE, more_body=False)
        await settle()
        batch.listening.set()
        assert [(await batch.hear())["done"] for _ in range(2)] == [1, 2]
        assert await batch.hear() is None
        await batch.task

    converse(create_app(settings), talk)


@pytest.fixture
def slow(settings):
    """Settings whose key allows an image, and then no other for longer than any test."""
    keys = (ApiKey(name="slow", key=KEY, rate_limit=1e-6, burst=1),)
    return settings.model_copy(update={"api_keys": keys})


def send_ahead(app, messages: int) -> Conversation:
    """Begin a batch with a slow key that sends many lines before it hears of the first."""
    batch = Conversation(app, headers=[(b"x-api-key", KEY.encode())])
    lines = AHEAD // 4 // len(LINE) * LINE
    for _ in range(messages):
        batch.say(lines)
    return batch


def test_a_client_that_goes_after_it_has_sent_ahead_is_given_up(slow):
    async def talk(app):
        batch = send_ahead(app, messages=10)
        assert (await batch.hear())["done"] == 1
        await settle()
        batch.go()
        await batch.task
        check_given_up(app, taken=0)

    converse(create_app(slow), talk)


def test_what_is_read_ahead_is_less_than_a_body(slow):
    async def talk(app):
        batch = send_ahead(app, messages=100)
        assert (await batch.hear())["done"] == 1
        await settle()
        read = (100 - batch.to_read.qsize()) * (AHEAD // 4)
        # Beside a message too much, and what has left the buffer for the line that waits.
        assert read <= slow.max_body_bytes + AHEAD // 4 + AHEAD
        assert app.state.serving.budget.held == 2 * slow.max_body_bytes
        batch.task.cancel()

    converse(create_app(slow), talk)
