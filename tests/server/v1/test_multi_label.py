"""A model of several classes a picture, in both protocols."""

import json
import shutil

import pytest
import torch
from fastapi.testclient import TestClient

from server.app import create_app
from server.models.loading import load_model
from server.settings import ModelSettings
from server.v1.answers import predictions
from tests.server.conftest import CLASSES


@pytest.fixture(scope="module")
def many(model_folder, tmp_path_factory) -> ModelSettings:
    folder = shutil.copytree(model_folder, tmp_path_factory.mktemp("many") / "many")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"multi_label": True}))
    return ModelSettings(name="many", backbone=str(folder))


@pytest.fixture(scope="module")
def client(settings, many):
    with TestClient(create_app(settings.model_copy(update={"models": (many,)}))) as client:
        yield client


def test_classes_are_scored_by_themselves_and_the_likely_all_listed(client, photo):
    query = {"top_k": 2, "logits": True}
    body = client.post("/v1/classify", params=query, files={"file": photo}).json()
    expected = torch.tensor(body["logits"]).sigmoid()
    listed = max(2, int((expected > 0.5).sum()))
    scores, classes = expected.topk(listed)
    assert [each["index"] for each in body["predictions"]] == classes.tolist()
    assert [each["score"] for each in body["predictions"]] == pytest.approx(
        scores.tolist(), abs=1e-5
    )
    assert client.get("/v1/models/many").json()["multi_label"] is True


def test_all_that_are_likely_are_listed_and_at_least_top_k(many):
    model = load_model(many)
    logits = torch.tensor([1.0, -1, 2, 3, -2, -3, -3, -3, -3, -3])
    assert [each.index for each in predictions(logits, model, 1)] == [3, 2, 0]
    assert [each.index for each in predictions(logits, model, 4)] == [3, 2, 0, 1]
    assert predictions(logits, model, 1)[0].label == CLASSES[3]


def test_probabilities_are_sigmoids(client):
    pixels = torch.zeros(1, 3, 64, 64)
    asked = {
        "inputs": [
            {"name": "pixels", "datatype": "FP32", "shape": [1, 3, 64, 64],
             "data": pixels.flatten().tolist()}
        ]
    }  # fmt: skip
    body = client.post("/v2/models/many/infer", json=asked).json()
    found = {each["name"]: torch.tensor(each["data"]) for each in body["outputs"]}
    torch.testing.assert_close(found["probabilities"], found["logits"].sigmoid())
