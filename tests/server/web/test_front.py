import re
import threading
from collections.abc import Iterator

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from server.app import create_app
from server.progress import Progress
from server.web.front import Front
from tests.server.conftest import problem

PATIENCE = 60
ORIGIN = "https://app.example.org"


class Start:
    """A start that goes on when it is told to."""

    def __init__(self, app: FastAPI) -> None:
        self.app = app
        self.begun, self.may_end, self.ready = (threading.Event() for _ in range(3))
        self.front = Front(self.load, lambda app: self.ready.set(), self.ready.set, (ORIGIN,))
        self.tell = lambda progress: None

    def load(self, tell) -> FastAPI:
        self.tell = tell
        self.begun.set()
        assert self.may_end.wait(PATIENCE)
        return self.app


@pytest.fixture
def start(settings) -> Start:
    return Start(create_app(settings))


@pytest.fixture
def client(start) -> Iterator[TestClient]:
    with TestClient(start.front) as client:
        assert start.begun.wait(PATIENCE)
        yield client
        start.may_end.set()


@pytest.mark.parametrize("path", ["/livez", "/healthz", "/v2/health/live"])
def test_it_lives_before_it_is_ready_and_says_so_alike(start, client, path):
    early = client.get(path)
    assert early.status_code == 200
    start.may_end.set()
    assert start.ready.wait(PATIENCE)
    assert client.get(path).json() == early.json()


def test_it_says_how_far_it_is(start, client):
    def ready() -> dict:
        answer = client.get("/readyz")
        assert answer.status_code == 503
        assert problem(answer) == f"the server is starting: {progress}"
        return answer.json()["progress"]

    progress = Progress()
    assert ready()["model"] is None
    start.tell(progress := Progress("tiny"))
    assert str(progress) == "model tiny is being loaded"
    assert ready()["model"] == "tiny"
    start.tell(progress := Progress("tiny", "tome", 3, 6))
    assert str(progress) == "model tiny: 3 of 6 rates are warm"
    assert ready() == {"model": "tiny", "ladder": "tome", "warm": 3, "rates": 6}
    assert str(Progress("tiny", "mine", 3, 6)) == "model tiny on mine: 3 of 6 rates are warm"
    start.may_end.set()
    assert start.ready.wait(PATIENCE)
    assert client.get("/readyz").json() == {"status": "ready"}


def test_everything_else_is_to_come_again(start, client, photo):
    early = client.post("/v1/classify", files={"file": photo}, headers={"X-Request-Id": "mine"})
    assert early.status_code == 503
    assert early.headers["Retry-After"] == "2"
    assert early.headers["X-Request-Id"] == "mine"
    assert problem(early).startswith("the server is starting: ")
    assert client.get("/nix").status_code == 503
    start.may_end.set()
    assert start.ready.wait(PATIENCE)
    assert client.post("/v1/classify", files={"file": photo}).status_code == 200
    assert client.get("/nix").status_code == 404


def test_pages_of_other_origins_can_read_how_far_it_is(client):
    asked = {
        "Origin": ORIGIN,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization",
    }
    preflight = client.options("/v1/classify", headers=asked)
    assert preflight.status_code == 200
    assert preflight.headers["access-control-allow-origin"] == ORIGIN
    early = client.post("/v1/classify", headers={"Origin": ORIGIN})
    assert early.status_code == 503
    assert early.headers["access-control-allow-origin"] == ORIGIN
    assert "Retry-After" in early.headers["access-control-expose-headers"].split(", ")
    other = client.get("/readyz", headers={"Origin": "https://example.com"})
    assert "access-control-allow-origin" not in other.headers


def test_browsers_get_a_page_that_looks_again(start, client):
    start.tell(Progress("<tiny>"))
    page = client.get("/", headers={"Accept": "text/html,*/*"})
    assert page.status_code == 503
    assert re.search(r'http-equiv="refresh" content="2"', page.text)
    assert "model &lt;tiny&gt; is being loaded" in page.text
    assert "value=" not in page.text  # nobody knows how long that takes
    start.tell(Progress("tiny", "tome", 3, 6))
    page = client.get("/", headers={"Accept": "text/html,*/*"})
    assert 'value="3" max="6"' in page.text
    assert client.get("/").json()["status"] == 503  # programs get what they get everywhere


def test_a_start_that_fails_is_told_to_whoever_runs_the_server():
    def load(tell):
        raise ValueError("no such model")

    failed = threading.Event()
    front = Front(load, lambda app: None, failed.set)
    with TestClient(front):
        assert failed.wait(PATIENCE)
    assert str(front.failure) == "no such model"
    assert front.app is None
