"""The class of every pixel, over HTTP."""

import asyncio
import base64
import io
import json
from collections.abc import Iterator

import numpy as np
import pytest
from fastapi.testclient import TestClient
from PIL import Image

from server.app import create_app
from server.engine.turns import NORMAL
from server.inference.run import Deadline
from server.models.segmenting import Scene
from server.settings import ApiKey, Settings
from server.v1 import segment as route
from tests.adapters.segmentation.test_task import COLOURS
from tests.server.conftest import call, picture, png, problem
from tests.server.segmenters import streets

SIZES = ((80, 64), (64, 90), (200, 70), (30, 30))
PICTURES = [png(picture(seed, *size)) for seed, size in enumerate(SIZES)]


def together(*pictures: bytes) -> dict:
    """Several pictures as JSON."""
    return {"images": [base64.b64encode(data).decode() for data in pictures]}


@pytest.fixture(scope="module")
def client(settings, tiny, tmp_path_factory) -> Iterator[TestClient]:
    segmenter = streets(tiny, tmp_path_factory.mktemp("tasks"))
    models = {"models": (tiny, segmenter), "max_pixels": 30_000}
    with TestClient(create_app(settings.model_copy(update=models))) as client:
        yield client


def segment(client: TestClient, data: bytes, **query: object) -> dict:
    answer = client.post("/v1/segment", params=query, files={"file": data})
    assert answer.status_code == 200, answer.text
    return answer.json()


def pixels(answer: dict) -> np.ndarray:
    """The class of each pixel, from runs."""
    values, lengths = answer["runs"][::2], answer["runs"][1::2]
    return np.repeat(np.array(values, dtype=np.uint8), lengths).reshape(answer["size"])


def test_runs_and_the_png_say_the_same(client):
    told = segment(client, PICTURES[2], rate=3)
    assert told["size"] == [70, 200]
    map_ = pixels(told)
    shares = np.bincount(map_.ravel(), minlength=3) / map_.size
    assert {each["index"]: each["share"] for each in told["classes"]} == {
        index: pytest.approx(share, abs=1e-6) for index, share in enumerate(shares) if share
    }
    assert sorted(shares, reverse=True)[0] == pytest.approx(told["classes"][0]["share"], abs=1e-6)
    for query, headers in (({"format": "png"}, {}), ({}, {"Accept": "image/png"})):
        answer = client.post(
            "/v1/segment", params={"rate": 3, **query}, content=PICTURES[2], headers=headers
        )
        assert answer.headers["content-type"] == "image/png"
        image = Image.open(io.BytesIO(answer.content))
        assert image.mode == "P"
        assert np.array_equal(np.asarray(image), map_)
        assert tuple(image.getpalette()[:9]) == sum(COLOURS, ())
        ran = json.loads(answer.headers["x-answer"])
        assert (ran["model"], ran["rate"], ran["macs"]) == ("streets", 3, told["macs"])


def test_the_answer_says_what_ran_and_what_it_cost(client):
    told = {rate: segment(client, PICTURES[0], rate=rate) for rate in (0, 4)}
    assert told[4]["compensate"] is True
    assert told[4]["bank_digest"]
    assert told[0]["macs_ratio"] == 1
    assert told[4]["macs_ratio"] == round(told[4]["macs"] / told[0]["macs"], 4) < 1
    assert segment(client, PICTURES[0], rate=4, compensate="false")["compensate"] is False
    within = segment(client, PICTURES[0], budget=0.9)
    assert within["rate"] > 0
    assert segment(client, PICTURES[0], rate="auto", max_rate=2)["rate"] <= 2


def test_a_model_says_that_it_segments(client):
    told = client.get("/v1/models/streets").json()
    assert told["kind"] == "segmentation"
    assert told["class_names"] == ["road", "sky", "tree"]
    assert told["palette"] == [list(colour) for colour in COLOURS]
    assert told["classes"] == 3
    assert told["task"]["name"] == "streets"
    there = client.get("/v1/models").json()["models"]
    assert [each["kind"] for each in there] == ["classification", "segmentation"]


def test_several_pictures_are_answered_in_their_order(client):
    images = together(PICTURES[0], b"no picture", PICTURES[1])
    answer = client.post("/v1/segment", json=images)
    first, second, third = answer.json()["results"]
    assert (first["size"], third["size"]) == ([64, 80], [90, 64])
    assert second["status"] == 415
    refused = client.post("/v1/segment?format=png", json=images)
    assert refused.status_code == 422
    assert "format=png is for one image" in problem(refused)


@pytest.mark.parametrize(
    ("path", "query", "size", "status", "message"),
    [
        ("/v1/segment", {}, (20_000, 1), 422, "20,000 x 1 pixels; its sides may differ by a fac"),
        ("/v1/segment", {}, (300, 200), 413, "at most 30,000 are allowed"),
        ("/v1/segment", {"rate": 6}, (8, 8), 422, "'streets' runs at the rates 0 to 5"),
        ("/v1/segment", {"format": "gif"}, (8, 8), 422, "format: Input should be 'json' or 'png'"),
        ("/v1/segment", {"top_k": 1}, (8, 8), 422, "there is no parameter 'top_k'"),
        ("/v1/segment", {"ladder": "x"}, (8, 8), 404, "no ladder 'x'"),
        (
            "/v1/segment",
            {"model": "tiny"},
            (8, 8),
            422,
            "'tiny' is for classification (/v1/classify), and this is for segmentation; models "
            "for that: streets",
        ),
        ("/v1/classify", {"model": "streets"}, (8, 8), 422, "'streets' is for segmentation"),
        ("/v1/embed", {"model": "streets"}, (8, 8), 422, "'streets' is for segmentation"),
        ("/v1/classify/batch", {"model": "streets"}, (8, 8), 422, "'streets' is for segmentation"),
    ],
)
def test_what_cannot_be_is_refused(client, path, query, size, status, message):
    file = {"file": png(Image.new("RGB", size))}
    answer = client.post(path, params=query, files=file)
    assert answer.status_code == status
    assert message in problem(answer)


def test_one_pixel_has_one_class(client):
    told = segment(client, png(Image.new("RGB", (1, 1))))
    assert told["size"] == [1, 1]
    assert told["runs"] == [told["classes"][0]["index"], 1]
    assert told["classes"][0]["share"] == 1


def test_without_a_model_for_it_there_is_nothing_to_ask(settings):
    alone: Settings = settings.model_copy(update={"models": settings.models[:1]})
    with TestClient(create_app(alone)) as client:
        answer = client.post("/v1/segment", files={"file": PICTURES[0]})
    assert answer.status_code == 422
    assert "models for that: none" in problem(answer)


@pytest.fixture
def made(monkeypatch) -> list[tuple[int, int]]:
    """The sizes of pictures whose classes were made."""
    made, classes = [], Scene.classes

    def noted(scene, scores):
        made.append(scene.size)
        return classes(scene, scores)

    monkeypatch.setattr(Scene, "classes", noted)
    return made


def let_time_pass(monkeypatch):
    monkeypatch.setattr(Deadline, "left", 0.0)


def test_classes_are_not_made_after_the_deadline(client, made, monkeypatch):
    """It passes while those of the first picture are made."""
    classes = Scene.classes

    def slow(scene, scores):
        let_time_pass(monkeypatch)
        return classes(scene, scores)

    monkeypatch.setattr(Scene, "classes", slow)
    pictures = PICTURES[0], PICTURES[1], b"no picture", PICTURES[2]
    answer = client.post("/v1/segment", json=together(*pictures))
    assert answer.status_code == 200
    first, second, third, fourth = answer.json()["results"]
    assert first["size"] == [64, 80]
    assert third["status"] == 415
    for late in (second, fourth):
        assert late["status"] == 504
        assert late["detail"] == "the deadline passed before the answer was there"
    assert made == [(64, 80)]


@pytest.mark.parametrize("answered", ["json", "png"])
def test_the_only_picture_is_too_late(client, made, monkeypatch, answered):
    answer_all = route.answer_all

    async def slow(*arguments):
        outcomes = await answer_all(*arguments)
        let_time_pass(monkeypatch)
        return outcomes

    monkeypatch.setattr(route, "answer_all", slow)
    answer = client.post("/v1/segment", params={"format": answered}, content=PICTURES[0])
    assert answer.status_code == 504
    assert problem(answer) == "the deadline passed before the answer was there"
    assert made == []


def test_classes_are_not_made_for_a_client_that_has_gone(client, made, monkeypatch):
    """It goes while those of the first picture are made."""
    classes = Scene.classes

    async def app(scope, receive, send):
        loop, going, unread = asyncio.get_running_loop(), asyncio.Event(), [receive]

        def leave(scene, scores):
            loop.call_soon_threadsafe(going.set)
            return classes(scene, scores)

        async def leaving():
            if unread:
                return await unread.pop()()
            await going.wait()
            return {"type": "http.disconnect"}

        monkeypatch.setattr(Scene, "classes", leave)
        await client.app(scope, leaving, send)

    body = json.dumps(together(*PICTURES[:3])).encode()
    message = {"type": "http.request", "body": body, "more_body": False}
    headers = (("Content-Type", "application/json"),)
    status, _, _ = call(app, message, path="/v1/segment", headers=headers)
    assert status == 499
    assert made == [(64, 80)]


def test_places_that_are_kept_for_high_priority_are_for_it(settings, tiny, tmp_path):
    keys = {name: name * 4 for name in ("high", "normal")}
    changed = {
        "models": (tiny, streets(tiny, tmp_path)),
        "api_keys": [ApiKey(name=name, key=key, priority=name) for name, key in keys.items()],
        "max_queue": 8,
        "warmup": "none",
    }
    app = create_app(settings.model_copy(update=changed))
    places = app.state.serving.engine._places
    with TestClient(app) as client:
        for _ in range(places.limit - 1):
            places.take(NORMAL)
        high, normal = (
            client.post("/v1/segment", content=PICTURES[0], headers={"X-API-Key": key})
            for key in keys.values()
        )
        for _ in range(places.limit - 1):
            places.leave(NORMAL)
    assert high.status_code == 200, high.text
    assert normal.status_code == 503
    assert "(1 more are kept for high priority)" in problem(normal)
