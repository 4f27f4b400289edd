import re

import pytest
from fastapi.testclient import TestClient

from server.app import create_app
from server.models.graphs import Graphs
from server.progress import Progress
from server.settings import BUNDLED_MODEL, ApiKey
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
    assert set(description["paths"]) >= {
        "/v1/classify",
        "/v1/classify/batch",
        "/v1/embed",
        "/v1/embeddings",
        "/models/{name}",
        "/v1/models",
        "/v1/models/{name}",
        "/v1/models/{name}/bank",
        "/v1/banks",
        "/v1/status",
        "/v2/models/{name}/infer",
        "/metrics",
        "/healthz",
        "/readyz",
    }
    classify = description["paths"]["/v1/classify"]["post"]
    asked = {each["name"]: each for each in classify["parameters"] if each["in"] == "query"}
    assert set(asked) == {
        "rate",
        "budget",
        "agreement",
        "ladder",
        "min_rate",
        "max_rate",
        "deadline_ms",
        "model",
        "top_k",
        "compensate",
        "logits",
        "merge_map",
    }
    assert all(parameter["description"] for parameter in asked.values())
    assert set(classify["requestBody"]["content"]) >= {"multipart/form-data", "image/jpeg"}
    assert {"200", "404", "413", "415", "422", "503", "504"} <= set(classify["responses"])
    assert list(classify["responses"]["422"]["content"]) == ["application/problem+json"]


def test_the_description_reads_well(client):
    description = client.get("/openapi.json").json()
    operations = [each for path in description["paths"].values() for each in path.values()]
    groups = [each["name"] for each in description["tags"]]
    for operation in operations:
        assert len(operation["tags"]) == 1, operation  # else it is listed twice
        assert operation["tags"][0] in groups
        assert operation["summary"]
        assert re.fullmatch(r"[a-z_]+", operation["operationId"])
    assert {each["tags"][0] for each in operations} == {*groups}
    ids = [each["operationId"] for each in operations]
    assert len({*ids}) == len(ids)


def test_problems_are_described_once(client):
    description = client.get("/openapi.json").json()
    assert set(description["components"]["schemas"]["Problem"]["required"]) >= {"type", "detail"}
    problems = [
        content
        for path in description["paths"].values()
        for operation in path.values()
        for response in operation["responses"].values()
        for kind, content in response.get("content", {}).items()
        if kind == "application/problem+json"
    ]
    assert problems
    for content in problems:
        assert content["schema"] == {"$ref": "#/components/schemas/Problem"}
        assert len(content["example"]) == 2


def test_every_problem_is_described_as_one(client):
    """A route with parameters would else be described with FastAPI's own kind of a 422."""
    assert "HTTPValidationError" not in client.get("/openapi.json").text


def test_a_route_that_wants_a_key_is_described_as_refusing_others(settings):
    keys = (ApiKey(name="one", key="k" * 16),)
    described = create_app(settings.model_copy(update={"api_keys": keys})).openapi()
    wanting = [
        operation
        for methods in described["paths"].values()
        for operation in methods.values()
        if "security" in operation
    ]
    assert len(wanting) > 10
    assert all("401" in operation["responses"] for operation in wanting)


PAGE = "https://app.example.org"
PREFLIGHT = {"Origin": PAGE, "Access-Control-Request-Method": "POST"}


def test_pages_of_other_origins_may_ask_if_they_are_named(settings, photo):
    app = create_app(settings.model_copy(update={"cors_origins": (PAGE,), "warmup": "none"}))
    with TestClient(app) as client:
        wanted = PREFLIGHT | {"Access-Control-Request-Headers": "authorization,content-type"}
        answer = client.options("/v1/classify", headers=wanted)
        assert answer.status_code == 200
        assert answer.headers["access-control-allow-origin"] == PAGE
        other = PREFLIGHT | {"Origin": "https://example.com"}
        assert client.options("/v1/classify", headers=other).status_code == 400
        unwanted = PREFLIGHT | {"Access-Control-Request-Method": "DELETE"}
        assert client.options("/v1/banks", headers=unwanted).status_code == 400
        for files, status in (({"file": photo}, 200), ({"file": b"junk"}, 415)):
            answer = client.post("/v1/classify", files=files, headers={"Origin": PAGE})
            assert answer.status_code == status
            assert answer.headers["access-control-allow-origin"] == PAGE
            exposed = answer.headers["access-control-expose-headers"].split(", ")
            assert {"X-Request-Id", "Server-Timing", "Retry-After"} <= {*exposed}
        # What another interface tells in headers, scripts can read, too.
        answer = client.post("/models/tiny", content=photo, headers={"Origin": PAGE})
        told = {"x-rate", "x-reason", "x-bank-digest"}
        assert told <= {*answer.headers} & {name.lower() for name in exposed}
        assert "X-Cached" in exposed


def test_pages_of_other_origins_may_not_ask_by_default(client, photo):
    assert client.options("/v1/classify", headers=PREFLIGHT).status_code == 405
    answer = client.post("/v1/classify", files={"file": photo}, headers={"Origin": PAGE})
    assert not [name for name in answer.headers if name.startswith("access-control")]


def test_the_engine_runs_warm_while_the_application_does(settings):
    app = create_app(settings)
    engine = app.state.serving.engine
    assert not engine.running
    with TestClient(app):
        assert engine.running
        # The weights of every rate have been folded; at some of them the model has run.
        tiny = app.state.serving.models.get("tiny")
        assert list(tiny._made) == [5, 4, 3, 2, 1]
        times = tiny.controller.times
        sizes = (1, 2, 4, 8, 16)
        assert set(times._table.cells) == {(rate, size) for rate in range(6) for size in sizes}
        assert times.batch(4, 16) > times.batch(4, 1) > 0
    assert not engine.running


def test_an_engine_does_not_outlive_a_start_that_fails(settings, monkeypatch):
    def fail(*_):
        raise RuntimeError("OpenVINO is broken")

    monkeypatch.setattr(Graphs, "start", fail)
    app = create_app(settings)
    with pytest.raises(RuntimeError, match="OpenVINO is broken"), TestClient(app):
        pass
    assert not app.state.serving.engine._worker.is_alive()


def test_it_tells_how_far_it_is(settings):
    told = []
    with TestClient(create_app(settings, told.append)):
        models = list(dict.fromkeys(progress.model for progress in told))
        assert models == ["tiny", "bare"]
        tiny = [each for each in told if each.model == "tiny"]
        assert tiny == [Progress("tiny"), *(Progress("tiny", "tome", warm, 6) for warm in range(6))]


@pytest.mark.parametrize(("warmup", "rates"), [("first", [0]), ("none", [])])
def test_less_may_be_warm_at_first(settings, photo, warmup, rates):
    told = []
    app = create_app(settings.model_copy(update={"warmup": warmup}), told.append)
    with TestClient(app) as client:
        assert client.get("/readyz").status_code == 200
        assert [each.rates for each in told if each.rates] == 2 * len(rates) * [1]
        tiny = app.state.serving.models.get("tiny")
        assert list(tiny._made) == []
        # What was not measured is estimated from what was.
        assert (tiny.controller.times.batch(5, 1) > 0) == bool(rates)
        for rate in ("5", "auto"):
            answer = client.post(f"/v1/classify?rate={rate}", files={"file": photo})
            assert answer.status_code == 200


def test_a_model_that_cannot_be_loaded(settings):
    lost = BUNDLED_MODEL.model_copy(update={"backbone": "bundled:nix"})
    with pytest.raises(BackboneError, match="nothing bundled is called 'nix'"):
        create_app(settings.model_copy(update={"models": (lost,)}))


@pytest.mark.parametrize("device", ["nix", "cuda:99"])
def test_a_device_that_is_not_there(settings, device):
    with pytest.raises(ConfigError, match=f"models cannot run on device '{device}': "):
        create_app(settings.model_copy(update={"device": device}))
