"""Images that decide their own compute, over HTTP."""

import base64
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fastapi.testclient import TestClient
from torch import Tensor

from adapters.cascade import Cascade, CascadePoint, margins, write_cascade
from adapters.ladder import digest
from server.app import create_app
from server.errors import ParameterError
from server.inference.cascade import cascade_work
from server.inference.query import RateQuery
from server.models.cascades import misfit
from server.models.loading import load_model
from server.models.pictures import prepare
from server.models.served import ServedModel
from server.settings import ModelSettings, Settings
from tests.server.conftest import picture, png, problem
from tests.server.segmenters import streets
from tocom import ConfigError, RateError

PHOTOS = [png(picture(seed)) for seed in range(12)]


def logits(model: ServedModel, data: bytes, rate: int) -> Tensor:
    image = prepare(data, model, Settings())
    with torch.inference_mode():
        return model.at(rate, True)(image[None])[0].logits


def calibrated(served: ServedModel, points: tuple[CascadePoint, ...]) -> Cascade:
    return Cascade(
        weights_digest=served.backbone.digest,
        bank_digest=served.bank_digest,
        ladder_digest=digest(served.ladder),
        source=0,
        points=points,
    )


@pytest.fixture(scope="module")
def cascade(served: ServedModel) -> Cascade:
    """Half of the photos run again at rate 2, and half of these at rate 0."""
    at_5 = torch.stack([logits(served, photo, 5) for photo in PHOTOS])
    at_2 = torch.stack([logits(served, photo, 2) for photo in PHOTOS])
    first = margins(at_5).sort().values[5:7].mean().item()
    again = margins(at_2)[margins(at_5) < first].sort().values[2:4].mean().item()
    return calibrated(
        served,
        (
            CascadePoint(rates=(5,), thresholds=(), agreement=0.8, share=0.6),
            CascadePoint(rates=(5, 2, 0), thresholds=(first, again), agreement=0.99, share=0.9),
            CascadePoint(rates=(0,), thresholds=(), agreement=1.0, share=1.0),
        ),
    )


@pytest.fixture(scope="module")
def path(cascade: Cascade, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_cascade(cascade, tmp_path_factory.mktemp("cascade") / "cascade.json")


@pytest.fixture(scope="module")
def client(tiny: ModelSettings, path: Path) -> Iterator[TestClient]:
    model = tiny.model_copy(update={"cascade": str(path)})
    bare = ModelSettings(name="bare", backbone=tiny.backbone)
    settings = Settings(models=(model, bare), device="cpu", max_graphs=0)
    with TestClient(create_app(settings)) as client:
        yield client


def ask(client: TestClient, photo: bytes, **params: Any) -> dict[str, Any]:
    answer = client.post("/v1/classify", params={"rate": "cascade", **params}, content=photo)
    assert answer.status_code == 200, answer.text
    body: dict[str, Any] = answer.json()
    return body


def test_an_answer_that_is_not_sure_runs_again(
    client: TestClient, served: ServedModel, cascade: Cascade
) -> None:
    found = [ask(client, photo, logits=True) for photo in PHOTOS]
    ran = sorted(tuple(body["rates"]) for body in found)
    assert ran == [(5,)] * 6 + [(5, 2)] * 3 + [(5, 2, 0)] * 3
    first, again = cascade.points[1].thresholds
    for photo, body in zip(PHOTOS, found, strict=True):
        expected = [5]
        if margins(logits(served, photo, 5)) < first:
            expected.append(2)
            if margins(logits(served, photo, 2)) < again:
                expected.append(0)
        assert body["rates"] == expected
        assert body["rate"] == expected[-1]
        assert body["logits"] == pytest.approx(
            logits(served, photo, expected[-1]).tolist(), abs=1e-5
        )
        assert body["macs"] == sum(served.costs[rate].macs for rate in expected)
        assert body["macs_ratio"] == round(sum(map(served.share, expected)), 4)
        assert body["reason"] == ("unsure" if expected[-1] == 0 else "sure")
        assert (body["asked_rate"], body["asked_agreement"]) == ("cascade", 0.99)
        assert body["asked_budget"] is None


def test_company_changes_nothing(client: TestClient) -> None:
    alone = [ask(client, photo, logits=True) for photo in PHOTOS]
    files = [("file", photo) for photo in PHOTOS]
    told = client.post(
        "/v1/classify", params={"rate": "cascade", "logits": True}, files=files
    ).json()["results"]
    for one, other in zip(alone, told, strict=True):
        assert other["rates"] == one["rates"]
        assert other["logits"] == pytest.approx(one["logits"], abs=1e-5)


def test_a_stream_and_features_may_be_of_a_cascade(client: TestClient) -> None:
    alone = [ask(client, photo)["rates"] for photo in PHOTOS]
    lines = client.post(
        "/v1/classify/batch",
        params={"rate": "cascade"},
        files=[("file", photo) for photo in PHOTOS],
    ).iter_lines()
    rates = {line["index"]: line["result"]["rates"] for line in map(json.loads, lines)}
    assert [rates[index] for index in range(len(PHOTOS))] == alone
    answer = client.post("/v1/embed", params={"rate": "cascade"}, content=PHOTOS[0]).json()
    assert answer["rates"] == alone[0]


def test_embeddings_tell_all_runs(client: TestClient, served: ServedModel) -> None:
    uris = [f"data:image/png;base64,{base64.b64encode(photo).decode()}" for photo in PHOTOS]
    body = {"input": uris, "rate": "cascade"}
    told = client.post("/v1/embeddings", json=body).json()["data"]
    for photo, item in zip(PHOTOS, told, strict=True):
        assert item["rates"] == ask(client, photo)["rates"]
        assert item["rate"] == item["rates"][-1]
        assert item["macs"] == sum(served.costs[rate].macs for rate in item["rates"])


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({"agreement": 0.75}, [5]),
        ({"agreement": 1}, [0]),
        ({"budget": 0.7}, [5]),
        ({"budget": 1}, [0]),
    ],
)
def test_agreement_or_a_mean_budget_choose_the_point(
    client: TestClient, params: dict[str, float], expected: list[int]
) -> None:
    body = ask(client, PHOTOS[0], **params)
    assert body["rates"] == expected
    assert body["reason"] == "asked"
    assert body["asked_budget"] == params.get("budget")
    assert body["asked_agreement"] == params.get("agreement")


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"agreement": 0.9, "budget": 0.9}, "agreement and budget both say"),
        ({"budget": 0.3}, "from 0.6 to 1; got budget=0.3"),
        ({"budget": 1.5}, "from 0.6 to 1; got budget=1.5"),
        ({"agreement": 0}, "answered as at rate 0, .* at most 1; got agreement=0"),
        ({"agreement": 1.5}, "at most 1; got agreement=1.5"),
        ({"compensate": False}, "compensate=false is not for rate=cascade"),
        ({"min_rate": 1}, "min_rate is for rate=auto, and the rate is 'cascade'"),
        ({"rate": 2, "agreement": 0.9}, "agreement is for rate=cascade, and the rate is '2'"),
        ({"rate": "auto", "agreement": 0.9}, "agreement is for rate=cascade, and the rate is 'au"),
        ({"model": "bare"}, "no calibration for rate=cascade: tocom-train calibrate-cascade"),
    ],
)
def test_what_cannot_be_had_is_refused(
    client: TestClient, params: dict[str, Any], message: str
) -> None:
    answer = client.post("/v1/classify", params={"rate": "cascade", **params}, content=PHOTOS[0])
    assert answer.status_code == 422
    assert re.search(message, problem(answer))


def test_a_cascade_is_for_classification(tiny: ModelSettings, tmp_path: Path) -> None:
    model = load_model(streets(tiny, tmp_path))
    with pytest.raises(ParameterError, match="classification is, and .* 'streets' is for segmenta"):
        cascade_work(model, RateQuery(rate="cascade"), trace=False)


def test_the_protocol_tells_all_runs(client: TestClient) -> None:
    alone = [ask(client, photo)["rates"] for photo in PHOTOS]
    body = {
        "inputs": [
            {
                "name": "image",
                "shape": [len(PHOTOS)],
                "datatype": "BYTES",
                "data": [base64.b64encode(photo).decode() for photo in PHOTOS],
            }
        ],
        "parameters": {"rate": "cascade", "agreement": 0.9},
    }
    told = client.post("/v2/models/tiny/infer", json=body).json()["parameters"]
    assert told["rates"] == ",".join("+".join(map(str, rates)) for rates in alone)
    assert told["rate"] == 0


def test_models_tell_their_cascades(client: TestClient) -> None:
    tiny, bare = client.get("/v1/models").json()["models"]
    assert [each["rates"] for each in tiny["ladders"][0]["cascade"]] == [[5], [5, 2, 0], [0]]
    assert bare["ladders"][0]["cascade"] == []


def test_metrics_count_runs_and_answers(client: TestClient) -> None:
    def count(line: str) -> float:
        text = client.get("/metrics").text
        return next(
            (float(row.split()[-1]) for row in text.splitlines() if row.startswith(line)), 0
        )

    at_0 = 'tocom_cascade_runs_total{ladder="tome",model="tiny",rate="0"}'
    sure = 'tocom_cascade_images_total{ladder="tome",model="tiny",rate="5",reason="sure"}'
    before = count(at_0), count(sure)
    found = [ask(client, photo)["rates"] for photo in PHOTOS]
    assert count(at_0) - before[0] == sum(0 in rates for rates in found)
    assert count(sure) - before[1] == found.count([5])


def test_a_cascade_of_another_bank_is_refused(
    tiny: ModelSettings, cascade: Cascade, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = cascade.model_copy(update={"bank_digest": "f" * 64})
    named = tiny.model_copy(update={"cascade": str(write_cascade(other, tmp_path / "c.json"))})
    with pytest.raises(ConfigError, match="calibrated for the bank ffffffffffff, served is"):
        load_model(named)


def test_a_cascade_beyond_the_models_rates_is_refused(
    tiny: ModelSettings, cascade: Cascade, tmp_path: Path
) -> None:
    point = cascade.points[0].model_copy(update={"rates": (6,)})
    other = cascade.model_copy(update={"points": (point, *cascade.points[1:])})
    named = tiny.model_copy(update={"cascade": str(write_cascade(other, tmp_path / "c.json"))})
    with pytest.raises(ConfigError, match="calibrated for the rate 6, served are 0 to 5"):
        load_model(named)


def test_a_swapped_bank_ends_the_cascade(
    client: TestClient, tiny: ModelSettings, path: Path
) -> None:
    model = load_model(tiny.model_copy(update={"cascade": str(path)}))
    assert misfit(model) is None
    assert "served is none" in str(misfit(model.with_bank(None)))


def test_a_wrong_rate_is_told_that_there_is_a_cascade(tiny: ModelSettings, path: Path) -> None:
    model = load_model(tiny.model_copy(update={"cascade": str(path)}))
    with pytest.raises(RateError, match="0 to 5, whole numbers, auto or cascade; got rate='99'"):
        model.parse_rate("99")
