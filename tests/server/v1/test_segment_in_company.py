"""Requests for classes of pixels beside those of other tasks, all on the same weights."""

import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from server.app import create_app
from tests.adapters.test_task import random_task
from tests.server.conftest import MAX_RATE
from tests.server.segmenters import streets
from tests.server.v1.test_segment import PICTURES, pixels, segment
from tocom import load_backbone

RATES = (0, 2, MAX_RATE)


@pytest.fixture(scope="module")
def app(settings, tiny, tmp_path_factory) -> FastAPI:
    """A server of a classifier, a task of classification and one of segmentation."""
    folder = tmp_path_factory.mktemp("tasks")
    colours = random_task(load_backbone(tiny.backbone)).save(folder / "colours")
    others = tiny.model_copy(update={"name": "colours", "task": str(colours)})
    models = (tiny, others, streets(tiny, folder))
    return create_app(settings.model_copy(update={"models": models}))


@pytest.fixture(scope="module")
def client(app) -> Iterator[TestClient]:
    with TestClient(app) as client:
        yield client


def classify(client: TestClient, model: str, data: bytes, rate: int) -> dict:
    query = {"model": model, "rate": rate, "logits": True}
    answer = client.post("/v1/classify", params=query, files={"file": data})
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_two_hundred_of_all_sizes_and_rates_are_answered_as_alone(client):
    cases = [
        (model, photo, rate)
        for model in ("streets", "tiny", "colours")
        for photo in range(len(PICTURES))
        for rate in RATES
    ]

    def ask(case: tuple[str, int, int]) -> dict:
        model, photo, rate = case
        if model == "streets":
            return segment(client, PICTURES[photo], rate=rate)
        return classify(client, model, PICTURES[photo], rate)

    alone = {case: ask(case) for case in cases}
    for photo in range(len(PICTURES)):
        low, high = (pixels(alone["streets", photo, rate]) for rate in (0, MAX_RATE))
        assert 0.5 < (low == high).mean() < 0.9  # answers tell rates apart
    draw = random.Random(0)
    asked = draw.choices([case for case in cases if case[0] == "streets"], k=200)
    asked += draw.choices([case for case in cases if case[0] != "streets"], k=60)
    draw.shuffle(asked)
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(ask, asked))
    assert max(answer["batch_size"] for answer in answers) > 1
    for case, answer in zip(asked, answers, strict=True):
        own = alone[case]
        assert (answer["model"], answer["rate"]) == (case[0], case[2])
        assert answer["macs"] == own["macs"]
        if case[0] == "streets":
            # Another rounding may decide a pixel between two classes that are as likely.
            assert (pixels(answer) == pixels(own)).mean() > 0.999
        else:
            assert answer["logits"] == pytest.approx(own["logits"], abs=1e-3)


def test_all_of_them_hold_the_weights_once(app):
    tiny, *others = app.state.serving.models.all()
    own = {id(each) for each in tiny.backbone.model.parameters()}
    for model in others:
        left = {
            name for name, each in model.backbone.model.named_parameters() if id(each) not in own
        }
        assert left <= {"head.weight", "head.bias"}
