"""The class of every pixel, over HTTP."""

import base64
import io
import json
from collections.abc import Iterator

import numpy as np
import pytest
from fastapi.testclient import TestClient
from PIL import Image

from server.app import create_app
from server.settings import Settings
from tests.adapters.segmentation.test_task import COLOURS
from tests.server.conftest import picture, png, problem
from tests.server.segmenters import streets

SIZES = ((80, 64), (64, 90), (200, 70), (30, 30))
PICTURES = [png(picture(seed, *size)) for seed, size in enumerate(SIZES)]


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
    images = [base64.b64encode(data).decode() for data in (PICTURES[0], b"no picture", PICTURES[1])]
    answer = client.post("/v1/segment", json={"images": images})
    first, second, third = answer.json()["results"]
    assert (first["size"], third["size"]) == ([64, 80], [90, 64])
    assert second["status"] == 415
    refused = client.post("/v1/segment?format=png", json={"images": images})
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
