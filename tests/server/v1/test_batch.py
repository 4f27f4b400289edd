"""Streams of images: by their lines, and message by message as bare ASGI."""

import asyncio
import base64
import json
import math
import threading

import pytest
import torch
from fastapi.testclient import TestClient

from server.app import create_app
from server.settings import ApiKey
from server.v1.batch import PATH
from tests.server.conftest import picture, png, problem
from tests.server.v1.conversation import Conversation, converse, settle
from tests.server.works import PATIENCE, Exact, submit_one

NDJSON = {"Content-Type": "application/x-ndjson"}
KEY = "k" * 16


def line(data: bytes, name: str | None = None) -> bytes:
    return json.dumps({"name": name, "b64": base64.b64encode(data).decode()}).encode() + b"\n"


def lines(answer) -> list[dict]:
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "application/x-ndjson"
    return [json.loads(each) for each in answer.text.splitlines()]


def post(client: TestClient, body: bytes, **query: object):
    return client.post(PATH, params=query, content=body, headers=NDJSON)


def test_every_image_gets_what_it_gets_alone(client):
    pictures = [png(picture(seed)) for seed in range(5)]
    answered = lines(post(client, b"".join(map(line, pictures)), rate=3, logits=True))
    assert sorted(each["index"] for each in answered) == [0, 1, 2, 3, 4]
    for each in answered:
        alone = client.post(
            "/v1/classify?rate=3&logits=true", files={"file": pictures[each["index"]]}
        ).json()
        assert each["result"]["rate"] == 3
        assert each["result"]["logits"] == pytest.approx(alone["logits"], abs=1e-4)


def test_the_lines_tell_how_far_it_is(client, photo):
    answered = lines(post(client, b"".join(line(photo, f"{i}.png") for i in range(4))))
    assert [each["done"] for each in answered] == [1, 2, 3, 4]
    assert {each["name"] for each in answered} == {"0.png", "1.png", "2.png", "3.png"}
    assert answered[-1]["total"] == 4


def test_a_form(client, photo):
    files = [("file", (name, photo)) for name in ("a.png", "b.png", "a.png")]
    answered = lines(client.post(PATH, files=files))
    named = sorted((each["index"], each["name"]) for each in answered)
    assert named == [(0, "a.png"), (1, "b.png"), (2, "a.png")]


def test_what_cannot_be_answered_is_told_and_the_rest_goes_on(client, photo):
    body = line(photo) + b"\n{\n" + line(photo[:100]) + b'{"b64": "?"}\n' + line(photo).rstrip()
    answered = {each["index"]: each for each in lines(post(client, body))}
    assert sorted(answered) == [0, 1, 2, 3, 4]
    assert {index for index in answered if "result" in answered[index]} == {0, 4}
    errors = [answered[index]["error"] for index in (1, 2, 3)]
    assert [error["status"] for error in errors] == [422, 422, 422]
    assert "Invalid JSON" in errors[0]["detail"]
    assert "cannot be decoded" in errors[1]["detail"]
    assert "the line's b64: this is not base64" in errors[2]["detail"]
    assert {error["instance"] for error in errors} == {PATH}


def test_a_line_that_is_nested_too_deeply_costs_one_image(client, photo):
    body = b"[" * 10**5 + b"\n" + b'{"b64":' * 10**5 + b"\n" + line(photo)
    answered = {each["index"]: each for each in lines(post(client, body))}
    assert "result" in answered[2]
    for index in (0, 1):
        assert answered[index]["error"]["status"] == 422
        assert "recursion limit exceeded" in answered[index]["error"]["detail"]


def test_no_images(client):
    assert lines(post(client, b"")) == []


@pytest.mark.parametrize(
    ("request_", "status", "message"),
    [
        ({"json": {}}, 415, "a body of type 'application/json' is not read here: send images as"),
        ({"files": {"x": b"x"}}, 400, "the form has a field 'x', only 'file' is read"),
        ({"content": b"x" * (2**20 + 1), "headers": NDJSON}, 413, "a line is larger than the 1,0"),
        ({"files": {"file": bytes(2**20 + 2**17)}}, 413, "a file of the form is larger than the"),
        ({"content": b"", "params": {"rate": 6}, "headers": NDJSON}, 422, "the rates 0 to 5"),
        ({"content": b"", "params": {"top_k": 11}, "headers": NDJSON}, 422, "must be in 1..10"),
        ({"content": b"", "params": {"model": "nix"}, "headers": NDJSON}, 404, "no model is call"),
    ],
)
def test_what_is_wrong_as_a_whole_is_the_status(client, request_, status, message):
    answer = client.post(PATH, **request_)
    assert answer.status_code == status
    assert message in problem(answer)


def test_what_goes_wrong_later_is_the_last_line(client, photo):
    answered = lines(post(client, line(photo) + b"x" * (2**20 + 1)))
    assert [each["index"] for each in answered] == [0, None]
    assert answered[1]["error"]["status"] == 413
    assert (answered[1]["done"], answered[1]["total"]) == (1, None)


def test_a_body_may_be_larger_than_others(client):
    """As a whole; each of its lines has the limit that bodies have."""
    large = png(picture(0, 990, 990))
    body = line(large) * (2**21 // len(line(large)) + 1)
    assert len(line(large)) < 2**20 < 2**21 < len(body)
    answered = lines(post(client, body))
    assert all("result" in each for each in answered)
    assert len(answered) == body.count(b"\n")


class Held:
    """Lets images be decoded one by one, and counts those that began."""

    def __init__(self, monkeypatch):
        self.begun = threading.Semaphore(0)
        self.go = threading.Semaphore(0)
        self.count = 0
        monkeypatch.setattr("server.v1.stream.prepare", self)

    def __call__(self, data, model, settings):
        self.count += 1
        self.begun.release()
        assert self.go.acquire(timeout=PATIENCE)
        return torch.zeros(model.input_size)


@pytest.fixture
def held(monkeypatch):
    held = Held(monkeypatch)
    yield held
    held.go.release(1000)


def test_answers_come_while_images_still_arrive(settings, photo):
    async def talk(app):
        batch = Conversation(app)
        for index in range(3):
            batch.say(line(photo, str(index)))
            heard = await batch.hear()
            assert batch.status == 200
            assert (heard["index"], heard["name"], heard["total"]) == (index, str(index), None)
        batch.say(b"", more_body=False)
        assert await batch.hear() is None

    converse(create_app(settings), talk)


def read_nothing_ahead(monkeypatch):
    """But the one message in which a client's going might have been."""
    monkeypatch.setattr("server.web.ahead.AHEAD", 0)
    monkeypatch.setattr("server.web.ahead.Ahead.allow", lambda *_: None)


def test_no_more_images_are_read_than_are_worked_on(settings, photo, held, monkeypatch):
    read_nothing_ahead(monkeypatch)

    async def talk(app):
        batch = Conversation(app)
        for _ in range(5):
            batch.say(line(photo))
        batch.say(b"", more_body=False)
        for done in range(1, 6):
            assert await asyncio.to_thread(held.begun.acquire, timeout=60)
            await settle()
            # Two in the engine and, from the third on, one in hand that waits for its place, and
            # one ahead.
            assert app.state.serving.engine.load().taken == min(2, 6 - done)
            assert batch.to_read.qsize() == max(0, 3 - done)
            held.go.release()
            assert (await batch.hear())["done"] == done
        assert await batch.hear() is None

    small = settings.model_copy(update={"batch_window": 2, "decode_threads": 1})
    converse(create_app(small), talk)


def test_reading_stops_when_enough_is_unread(settings, photo, monkeypatch):
    monkeypatch.setattr("server.v1.stream.UNREAD", 3)
    read_nothing_ahead(monkeypatch)

    async def talk(app):
        batch = Conversation(app)
        batch.say(line(photo))
        assert (await batch.hear())["done"] == 1
        batch.listening.clear()
        for _ in range(9):
            batch.say(b"broken\n")
        await settle()
        # Three that nobody has heard of, one in hand and one ahead.
        assert batch.to_read.qsize() == 9 - 5
        batch.say(b"", more_body=False)
        batch.listening.set()
        assert [(await batch.hear())["done"] for _ in range(9)] == list(range(2, 11))
        assert await batch.hear() is None

    converse(create_app(settings), talk)


@pytest.mark.parametrize("early", [True, False], ids=["while it sends", "after it has sent"])
def test_a_client_that_goes_gives_its_images_up(settings, photo, held, early):
    async def talk(app):
        batch = Conversation(app)
        batch.say(3 * line(photo), more_body=early)
        assert await asyncio.to_thread(held.begun.acquire, timeout=60)
        batch.go()
        await batch.task
        assert app.state.serving.engine.load().taken == 0
        held.go.release()

    converse(create_app(settings.model_copy(update={"decode_threads": 1})), talk)
    assert held.count == 1


def test_a_client_that_goes_while_its_images_wait_for_room(settings, photo, held):
    """Nothing of its request is read then, as its window is full."""

    async def talk(app):
        batch = Conversation(app)
        for _ in range(5):
            batch.say(line(photo))
        assert await asyncio.to_thread(held.begun.acquire, timeout=60)
        await settle()
        assert app.state.serving.engine.load().taken == 2
        batch.go()
        await batch.task
        assert app.state.serving.engine.load().taken == 0
        held.go.release()

    small = settings.model_copy(update={"batch_window": 2, "decode_threads": 1})
    converse(create_app(small), talk)
    assert held.count == 1


def test_a_client_that_goes_after_the_first_line(settings, photo, held):
    async def talk(app):
        batch = Conversation(app)
        batch.say(line(photo) * 3, more_body=False)
        held.go.release()
        assert (await batch.hear())["index"] == 0
        batch.go()
        assert await batch.hear() is None
        await batch.task
        assert app.state.serving.engine.load().taken == 0
        held.go.release()

    converse(create_app(settings.model_copy(update={"decode_threads": 1})), talk)


def test_a_full_queue_is_waited_for_and_half_of_it_is_left_to_others(settings, photo):
    async def talk(app):
        engine, go = app.state.serving.engine, threading.Event()
        blockers = [submit_one(engine, Exact(), go.wait, float("inf")) for _ in range(2)]
        batch = Conversation(app)
        batch.say(line(photo), more_body=False)
        await settle()
        # Four places, of which two are taken: another request finds room, the batch waits.
        assert engine.load().taken == 2
        engine.check_room(2)
        go.set()
        assert (await batch.hear())["result"]
        assert await batch.hear() is None
        assert all(blocker.exception(60) for blocker in blockers)

    converse(create_app(settings.model_copy(update={"max_queue": 4})), talk)


def test_a_deadline_is_for_the_whole_request(settings, photo, held, monkeypatch):
    async def talk(app):
        # The queue is so long that the image waits for its place until the deadline.
        scheduler = app.state.serving.engine._scheduler
        monkeypatch.setattr(scheduler, "alone", lambda *_: 0.0)
        monkeypatch.setattr(scheduler, "wait", lambda *_: math.inf)
        batch = Conversation(app, query=b"deadline_ms=1")
        batch.say(line(photo))
        problem_ = await batch.hear()
        assert batch.status == 504
        assert problem_["detail"] == "the deadline passed before all images were done"
        assert app.state.serving.engine.load().taken == 0

    converse(create_app(settings), talk)


def test_a_deadline_that_was_long_enough_for_some_images(client, photo, monkeypatch):
    scheduler = client.app.state.serving.engine._scheduler
    needs = iter((0.0, 0.0, math.inf))
    monkeypatch.setattr(scheduler, "alone", lambda *_: next(needs))  # the first is asked for twice
    *some, last = lines(post(client, 3 * line(photo), deadline_ms=60_000))
    assert [each["index"] for each in some] == [0]
    assert last["error"]["status"] == 504
    assert last["error"]["detail"] == "the deadline is too near for the images that are left"


def test_a_client_that_sends_nothing_more_is_given_up(settings, photo):
    async def talk(app):
        batch = Conversation(app)
        batch.say(line(photo))
        assert (await batch.hear())["result"]
        last = await batch.hear()
        assert last["error"]["status"] == 408
        assert last["error"]["detail"] == "no image arrived within 0.5 s"
        assert await batch.hear() is None

    converse(create_app(settings.model_copy(update={"timeout_ms": 500})), talk)


def test_a_server_that_stops_answers_what_it_has_taken(settings, photo, held):
    async def talk(app):
        batch = Conversation(app)
        batch.say(line(photo))
        assert await asyncio.to_thread(held.begun.acquire, timeout=60)
        app.state.serving.stopping.set()
        batch.say(line(photo))
        await settle()
        held.go.release()
        assert (await batch.hear())["result"]
        last = await batch.hear()
        assert (last["index"], last["error"]["status"]) == (None, 503)
        assert last["error"]["detail"] == "the server is shutting down"
        assert await batch.hear() is None

    converse(create_app(settings), talk)


def test_a_fault_of_ours_costs_one_image(settings, photo, monkeypatch, caplog):
    async def talk(app):
        batch = Conversation(app)
        monkeypatch.setattr("server.v1.stream.prepare", lambda *_: 1 / 0)
        batch.say(line(photo))
        heard = await batch.hear()
        assert heard["index"] == 0
        assert heard["error"]["status"] == 500
        assert "division" not in heard["error"]["detail"]
        batch.say(b"", more_body=False)
        assert await batch.hear() is None

    converse(create_app(settings), talk)
    assert "ZeroDivisionError" in caplog.text


def test_a_quota_slows_a_batch_down_and_ends_none(settings, photo, monkeypatch):
    charged = []

    async def charge(request):
        charged.append(request.state.caller.name)

    monkeypatch.setattr("server.v1.stream.charge_when_allowed", charge)
    keys = (ApiKey(name="someone", key=KEY, rate_limit=1, burst=1),)
    with TestClient(create_app(settings.model_copy(update={"api_keys": keys}))) as client:
        assert post(client, line(photo)).status_code == 401
        headers = NDJSON | {"X-API-Key": KEY}
        answer = client.post(PATH, content=3 * line(photo), headers=headers)
        assert len(lines(answer)) == 3
    assert charged == ["someone"] * 2  # the first image was charged at the door


def test_a_request_of_nothing_but_faults_ends(client, monkeypatch):
    monkeypatch.setattr("server.v1.stream.FAILURES", 10)
    answered = lines(post(client, b"{}\n" * 1000))
    assert len(answered) < 20
    assert answered[-1]["index"] is None
    assert (
        "more than 10 images of this request could not be answered"
        in (answered[-1]["error"]["detail"])
    )
