"""Ladders and budgets over HTTP: what a request may ask for, and what it is told."""

from collections.abc import Iterator

import pytest
import torch
from fastapi.testclient import TestClient

from adapters import Bank
from server.app import create_app
from tests.server.conftest import MAX_RATE, problem, seen
from tests.server.ladders import CLUSTERS, RINGS, UNEVEN, on_ladders
from tocom import TOME, cost, trace

LADDERS = (TOME, UNEVEN, RINGS, CLUSTERS)


@pytest.fixture(scope="module")
def client(settings, tiny, tmp_path_factory) -> Iterator[TestClient]:
    """A server of a model on four ladders, and of one on the paper's alone."""
    folder = tmp_path_factory.mktemp("ladders")
    several = on_ladders(tiny, folder, *(ladder.name for ladder in LADDERS))
    alone = tiny.model_copy(update={"name": "alone"})
    given = settings.model_copy(update={"models": (several, alone), "max_batch": 1})
    with TestClient(create_app(given)) as client:
        yield client


def ask(client: TestClient, image: bytes, **query: object):
    return client.post("/v1/classify", params=query, files={"file": ("photo.png", image)})


@pytest.mark.parametrize("ladder", LADDERS, ids=lambda ladder: ladder.name)
def test_an_answer_is_that_of_the_ladder_and_says_so(client, served, photo, ladder):
    image = seen(served, photo)[None]
    for rate in range((ladder.top or MAX_RATE) + 1):
        body = ask(client, photo, ladder=ladder.name, rate=rate, logits=True, merge_map=True).json()
        counted = cost(served.backbone.model, rate, ladder=ladder)
        whole = cost(served.backbone.model, 0, ladder=ladder)
        assert (body["ladder"], body["method"]) == (ladder.name, ladder.method.name)
        assert (body["rate"], body["asked_rate"], body["reason"]) == (rate, str(rate), "asked")
        assert (body["asked_budget"], body["macs"]) == (None, counted.macs)
        assert body["macs_ratio"] == round(counted.macs / whole.macs, 4)
        assert body["tokens"]["blocks"] == list(counted.plan.tokens)
        has_bank = ladder == TOME and rate > 0
        assert body["compensate"] is has_bank
        assert (body["bank_digest"] is None) is (ladder != TOME)
        delta = served.delta(rate) if has_bank else None
        traced = trace(served.backbone.model, image, rate, delta, ladder=ladder)
        logits = torch.tensor(body["logits"])
        torch.testing.assert_close(logits, traced.logits[0], atol=1e-4, rtol=0)
        assert body["merge_map"]["tokens"] == traced.source[0, 1:].tolist()


def test_a_merge_map_tells_dropped_patches_from_others(client, photo):
    rings = ask(client, photo, ladder="rings", rate=2, merge_map=True).json()["merge_map"]
    assert (rings["tokens"].count(-1), rings["dropped"]) == (12, 12)
    left = [token for token in rings["tokens"] if token >= 0]
    assert sorted(left) == [1, 2, 3, 4]  # the others are there, each by itself
    merged = ask(client, photo, ladder="uneven", rate=2, merge_map=True).json()["merge_map"]
    assert (min(merged["tokens"]), merged["dropped"]) == (1, 0)


def test_the_default_ladder_is_the_first(client, photo):
    assert ask(client, photo, rate=3).json()["ladder"] == "tome"
    assert ask(client, photo, rate=3, model="alone", ladder="tome").json()["ladder"] == "tome"


@pytest.mark.parametrize(
    ("query", "status", "message"),
    [
        (
            {"ladder": "nix"},
            404,
            "the model 'tiny' has no ladder 'nix'; there are: tome, uneven, rings, clusters",
        ),
        (
            {"ladder": "rings", "model": "alone"},
            404,
            "the model 'alone' has no ladder 'rings'; there are: tome",
        ),
        (
            {"ladder": "rings", "rate": 3},
            422,
            "the model 'tiny' runs at the rates 0 to 2 of the ladder 'rings', whole numbers, or "
            "auto; got rate='3'",
        ),
        (
            {"rate": 2, "budget": 0.75},
            422,
            "rate and budget both say how much an image may cost: only one may be there, got "
            "rate='2' and budget=0.75",
        ),
        (
            {"rate": "auto", "budget": 0.75},
            422,
            "rate and budget both say how much an image may cost: only one may be there, got "
            "rate='auto' and budget=0.75",
        ),
        (
            {"budget": 0.75, "min_rate": 1},
            422,
            "min_rate is for rate=auto, and this asks for a budget",
        ),
        ({"budget": "much"}, 422, "budget: Input should be a valid number, unable to parse"),
    ],
)
def test_what_is_not_there(client, photo, query, status, message):
    answer = ask(client, photo, **query)
    assert answer.status_code == status
    assert message in problem(answer)


def shares(model, ladder) -> list[float]:
    macs = [cost(model, rate, ladder=ladder).macs for rate in range((ladder.top or MAX_RATE) + 1)]
    return [each / macs[0] for each in macs]


@pytest.mark.parametrize("ladder", LADDERS, ids=lambda ladder: ladder.name)
def test_a_budget_is_the_lowest_rate_that_keeps_it(client, served, photo, ladder):
    there = shares(served.backbone.model, ladder)
    for rate, share in enumerate(there):
        body = ask(client, photo, ladder=ladder.name, budget=share).json()
        assert (body["rate"], body["asked_rate"]) == (there.index(share), "budget")
        assert (body["asked_budget"], body["reason"]) == (share, "asked")
        if rate:
            just_less = ask(client, photo, ladder=ladder.name, budget=there[rate - 1] - 1e-9)
            assert just_less.json()["rate"] == rate
    assert ask(client, photo, ladder=ladder.name, budget=1).json()["rate"] == 0


@pytest.mark.parametrize("budget", [0, 2, -0.5, 0.01, "nan", "inf"])
def test_budgets_that_cannot_be_kept(client, served, photo, budget):
    answer = ask(client, photo, ladder="rings", budget=budget)
    assert answer.status_code == 422
    least = shares(served.backbone.model, RINGS)[2]
    told = problem(answer)
    assert told.startswith("a budget is a share of the multiply-adds of rate 0, at most 1; the ")
    assert f"of the model 'tiny', 2 of the ladder 'rings', takes {least:.4g}" in told[:150]
    assert told.endswith(f"of them; got budget={float(budget):g}")
    named = told.partition(" takes ")[2].partition(" of")[0]
    assert ask(client, photo, ladder="rings", budget=named).json()["rate"] == 2


def test_auto_chooses_on_any_ladder(client, photo):
    body = ask(client, photo, ladder="rings", rate="auto", min_rate=1).json()
    assert (body["ladder"], body["rate"], body["reason"]) == ("rings", 1, "quality")
    refused = problem(ask(client, photo, ladder="rings", rate="auto", max_rate=3))
    assert refused == ("max_rate must be in 0..2 for the model 'tiny' on the ladder 'rings', got 3")


def test_features_and_batches_take_them_too(client, photo):
    query = {"ladder": "clusters", "budget": 0.9}
    embedded = client.post("/v1/embed", params=query, files={"file": photo}).json()
    assert (embedded["ladder"], embedded["rate"], embedded["asked_budget"]) == ("clusters", 1, 0.9)
    line = client.post("/v1/classify/batch", params=query, files={"file": photo}).json()
    assert (line["result"]["ladder"], line["result"]["rate"]) == ("clusters", 1)


def test_models_list_their_ladders(client, served, bank_folder):
    (listed, alone) = client.get("/v1/models").json()["models"]
    assert [each["name"] for each in alone["ladders"]] == ["tome"]
    assert listed["ladders"] == client.get("/v1/models/tiny").json()["ladders"]
    bank = {"name": "tiny", "digest": Bank.load(bank_folder).info.digest}
    for told, ladder in zip(listed["ladders"], LADDERS, strict=True):
        assert (told["name"], told["method"]) == (ladder.name, ladder.method.name)
        assert told["max_rate"] == (MAX_RATE if ladder.top is None else ladder.top)
        assert told["bank"] == (bank if ladder == TOME else None)
        for rate, rung in enumerate(told["rungs"]):
            counted = cost(served.backbone.model, rate, ladder=ladder)
            assert (rung["rate"], rung["macs"]) == (rate, counted.macs)
            assert rung["tokens"] == list(counted.plan.tokens)
        assert [rung["share"] for rung in told["rungs"]] == shares(served.backbone.model, ladder)
    rings = listed["ladders"][2]
    assert rings["options"] == {"norm": "l2"}
    # What the ladder's file has of it.
    assert [rung["kl"] for rung in rings["rungs"]] == [0, None, 0.25]
    assert [rung["agreement"] for rung in rings["rungs"]] == [100, None, 75]
    assert [rung["top1"] for rung in rings["rungs"]] == [None, None, 50]


def test_the_open_inference_protocol_has_them(client, photo):
    headers = {"Inference-Header-Content-Length": "0"}
    plain = client.post("/v2/models/tiny/infer", content=photo, headers=headers)
    assert plain.status_code == 200

    def infer(**parameters: object):
        pixels = torch.zeros(1, 3, 64, 64)
        tensor = {"name": "pixels", "shape": [1, 3, 64, 64], "datatype": "FP32"}
        body = {"parameters": parameters, "inputs": [tensor | {"data": pixels.flatten().tolist()}]}
        return client.post("/v2/models/tiny/infer", json=body)

    told = infer(ladder="rings", budget=0.5).json()["parameters"]
    assert (told["ladder"], told["method"], told["rate"]) == ("rings", "pattern", 2)
    assert told["macs_ratio"] < 0.5
    assert "bank_digest" not in told
    assert "no ladder 'nix'" in problem(infer(ladder="nix"))
    assert "only one may be there" in problem(infer(budget=0.5, rate=2))
    config = client.get("/v2/models/tiny/config").json()["parameters"]
    assert config["ladders"]["string_value"] == "tome,uneven,rings,clusters"


def test_counters_name_the_ladders_that_there_are_and_no_others(client, photo):
    ask(client, photo, ladder="rings", rate=2)
    ask(client, photo, ladder="made-up", rate=2)
    text = client.get("/metrics").text
    assert 'tocom_images_total{ladder="rings",model="tiny",rate="2"}' in text
    assert 'tocom_requests_total{code="404",ladder="",model="",rate=""}' in text
    assert "made-up" not in text
