import re

import pytest
from fastapi.testclient import TestClient

from server import create_app
from server.settings import BUNDLED_MODEL
from tocom import BackboneError, ConfigError


def test_the_documentation_loads_nothing_from_the_network(client):
    page = client.get("/docs").text
    links = re.findall(r"""(?:href|src)=["'](.+?)["']""", page)
    assert len(links) >= 2
    for link in links:
        assert link.startswith("/")
        assert client.get(link).status_code == 200
    assert "/openapi.json" in page


def test_the_interface_is_described(client):
    description = client.get("/openapi.json").json()
    assert set(description["paths"]) == {
        "/v1/classify",
        "/v1/models",
        "/v1/models/{name}",
        "/healthz",
        "/readyz",
    }
    classify = description["paths"]["/v1/classify"]["post"]
    assert {parameter["name"] for parameter in classify["parameters"]} == {
        "rate",
        "model",
        "top_k",
        "compensate",
        "logits",
    }
    assert all(parameter["description"] for parameter in classify["parameters"])
    assert set(classify["requestBody"]["content"]) >= {"multipart/form-data", "image/jpeg"}
    assert {"200", "404", "413", "415", "422", "503", "504"} <= set(classify["responses"])
    assert list(classify["responses"]["422"]["content"]) == ["application/problem+json"]


def test_the_engine_runs_warm_while_the_application_does(settings):
    app = create_app(settings)
    engine = app.state.serving.engine
    assert not engine.running
    with TestClient(app):
        assert engine.running
        # At its highest rate the model has run, so its weights have been folded.
        assert list(app.state.serving.models["tiny"]._folded) == [5]
    assert not engine.running


def test_a_model_that_cannot_be_loaded(settings):
    lost = BUNDLED_MODEL.model_copy(update={"backbone": "bundled:nix"})
    with pytest.raises(BackboneError, match="nothing bundled is called 'nix'"):
        create_app(settings.model_copy(update={"models": (lost,)}))


@pytest.mark.parametrize("device", ["nix", "cuda:99"])
def test_a_device_that_is_not_there(settings, device):
    with pytest.raises(ConfigError, match=f"models cannot run on device '{device}': "):
        create_app(settings.model_copy(update={"device": device}))
