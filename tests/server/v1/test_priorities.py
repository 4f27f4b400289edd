"""Priorities over HTTP."""

import base64

from fastapi.testclient import TestClient

from server.app import create_app
from server.engine.turns import NORMAL
from server.settings import ApiKey


def test_places_that_are_kept_for_high_priority_are_had_by_it_on_every_route(settings, photo):
    keys = [ApiKey(name=name, key=name * 20, priority=name) for name in ("high", "normal")]
    limits = settings.model_copy(update={"api_keys": tuple(keys), "max_queue": 8})
    encoded = base64.b64encode(photo).decode()
    asked = {
        "/v1/classify": {"content": photo},
        "/v1/embed": {"content": photo},
        "/v1/embeddings": {"json": {"input": f"data:image/png;base64,{encoded}"}},
        "/models/tiny": {"content": photo},
        "/v2/models/tiny/infer": {
            "json": {
                "inputs": [{"name": "image", "datatype": "BYTES", "shape": [1], "data": [encoded]}]
            }
        },
    }
    with TestClient(create_app(limits)) as http:
        places = http.app.state.serving.engine._places
        for _ in range(7):
            places.take(NORMAL)
        for path, body in asked.items():
            for name, status in (("normal", 503), ("high", 200)):
                answer = http.post(path, headers={"X-API-Key": name * 20}, **body)
                assert answer.status_code == status, (path, name, answer.text)
