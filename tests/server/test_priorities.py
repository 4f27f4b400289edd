"""The priority of a key is that of its images, by whatever route they come."""

import base64
import json

import pytest
from fastapi.testclient import TestClient

from server.app import create_app
from server.engine.turns import HIGH, LOW, NORMAL
from server.settings import ApiKey
from tests.server.conftest import picture, png

PHOTO = png(picture(0))
B64 = base64.b64encode(PHOTO).decode()
KEYS = {name: f"{name}-{name[0] * 16}" for name in ("high", "normal", "low")}
TENSOR = {"name": "image", "shape": [1], "datatype": "BYTES", "data": [B64]}


@pytest.fixture(scope="module")
def client(settings):
    keys = tuple(ApiKey(name=name, key=key, priority=name) for name, key in KEYS.items())
    changed = {"api_keys": keys, "warmup": "none"}
    with TestClient(create_app(settings.model_copy(update=changed))) as client:
        yield client


@pytest.mark.parametrize(("name", "priority"), [("high", HIGH), ("normal", NORMAL), ("low", LOW)])
@pytest.mark.parametrize(
    ("path", "sent"),
    [
        ("/v1/classify", {"content": PHOTO}),
        ("/v1/embed", {"content": PHOTO}),
        (
            "/v1/classify/batch",
            {
                "content": json.dumps({"b64": B64}),
                "headers": {"Content-Type": "application/x-ndjson"},
            },
        ),
        ("/v1/embeddings", {"json": {"input": f"data:image/png;base64,{B64}"}}),
        ("/models/tiny", {"content": PHOTO}),
        ("/v2/models/tiny/infer", {"json": {"inputs": [TENSOR]}}),
    ],
)
def test_images_have_the_priority_of_their_key(client, monkeypatch, path, sent, name, priority):
    engine, asked = client.app.state.serving.engine, []
    submit_all = engine.submit_all

    def note(work, prepares, deadline, due, priority):
        asked.append(priority)
        return submit_all(work, prepares, deadline, due, priority)

    monkeypatch.setattr(engine, "submit_all", note)
    headers = {"X-API-Key": KEYS[name], **sent.get("headers", {})}
    answer = client.post(path, **{**sent, "headers": headers})
    assert answer.status_code == 200, answer.text
    assert asked == [priority]


def test_places_are_kept_for_high_priority_where_a_key_has_it(client, settings):
    assert client.app.state.serving.engine._places._kept == settings.max_queue // 8
    assert create_app(settings).state.serving.engine._places._kept == 0
