"""Embeddings as OpenAI's clients ask for them; and as vLLM's and infinity's ask for images."""

import base64
import json
from functools import partial

import numpy as np
import pytest
import torch
from fastapi.testclient import TestClient
from torch.nn import functional as F

from server.app import create_app
from server.settings import ApiKey
from tests.server.conftest import listening, picture, png, seen

PATH = "/v1/embeddings"
PICTURES = [png(picture(seed)) for seed in range(3)]
KEY = "alice-" + "k" * 16


def uri(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def part(data: bytes) -> dict:
    return {"type": "image_url", "image_url": {"url": uri(data)}}


@pytest.fixture(scope="module")
def expected(served):
    """The features of the pictures at a rate, [3, D]."""
    images = torch.stack([seen(served, data) for data in PICTURES])

    def features(rate: int = 0) -> torch.Tensor:
        with torch.inference_mode():
            return torch.stack([each.features for each in served.at(rate, True)(images)])

    return features


def vectors(answer) -> torch.Tensor:
    assert answer.status_code == 200, answer.text
    return torch.tensor([each["embedding"] for each in answer.json()["data"]])


def fault(answer, status: int) -> dict:
    """Check that an answer is an error as OpenAI's clients read it, and return it."""
    assert answer.status_code == status, answer.text
    body = answer.json()
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-request-id"]
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    return body["error"]


@pytest.mark.parametrize("rate", [0, 3])
def test_embeddings_are_the_features_at_length_1(client, served, expected, rate):
    body = {"model": "tiny", "input": [*map(uri, PICTURES)], "rate": rate}
    answer = client.post(PATH, json=body)
    torch.testing.assert_close(vectors(answer), F.normalize(expected(rate)), atol=1e-5, rtol=0)
    told = answer.json()
    assert (told["object"], told["model"]) == ("list", "tiny")
    assert told["usage"] == {"prompt_tokens": 3 * 17, "total_tokens": 3 * 17}
    for index, item in enumerate(told["data"]):
        assert (item["object"], item["index"]) == ("embedding", index)
        assert (item["rate"], item["reason"]) == (rate, "asked")
        assert item["macs"] == served.costs[rate].macs
        assert item["bank_digest"] == served.bank_digest


def test_base64_holds_the_same_numbers(client, expected):
    # What the stock client asks for where numpy is installed, and how it reads it.
    body = {"model": "tiny", "input": uri(PICTURES[0]), "encoding_format": "base64"}
    (item,) = client.post(PATH, json=body).json()["data"]
    numbers = np.frombuffer(base64.b64decode(item["embedding"]), dtype="float32")
    np.testing.assert_allclose(numbers, F.normalize(expected())[0], atol=1e-5)


def test_lengths_are_kept_if_asked_for(client, expected):
    answer = client.post(PATH, json={"input": uri(PICTURES[0]), "normalize": False})
    torch.testing.assert_close(vectors(answer), expected()[:1], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "body",
    [
        {"input": uri(PICTURES[1])},
        {"input": [uri(PICTURES[1])], "user": "me", "dimensions": 192},
        {"input": [uri(PICTURES[1])], "modality": "image", "dimensions": None, "user": None},
        {"input": part(PICTURES[1])},
        {"input": [part(PICTURES[1])]},
        {"messages": [{"role": "user", "content": [part(PICTURES[1])]}]},
    ],
)
def test_all_ways_to_send_an_image(client, expected, body):
    answer = client.post(PATH, json={"model": "tiny", **body})
    torch.testing.assert_close(vectors(answer), F.normalize(expected())[1:2], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("asked", "rate", "reason"),
    [
        ({"budget": 0.9}, 1, "asked"),
        ({"rate": "auto", "min_rate": 2, "deadline_ms": 60_000}, 2, ""),
    ],
)
def test_compute_may_be_asked_for_in_other_words(client, served, asked, rate, reason):
    answer = client.post(PATH, json={"input": uri(PICTURES[0]), **asked})
    (item,) = answer.json()["data"]
    assert item["rate"] >= rate
    assert item["macs_ratio"] == round(served.share(item["rate"]), 4)
    assert reason in item["reason"]


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (
            {"input": "a photo of a cat"},
            422,
            "images are embedded here, not text: expected a",
        ),
        ({"input": [[1, 2, 3]]}, 422, "input.0: Input should be"),
        ({"input": []}, 422, "input: List should have at least 1 item"),
        ({}, 422, "one of input and messages must be there, and only one"),
        ({"input": uri(b"x"), "messages": []}, 422, "messages: List should have at least 1 item"),
        ({"input": "data:image/png,AA=="}, 422, "must hold ;base64,"),
        ({"input": "data:image/png;base64,A"}, 422, "this is not base64"),
        ({"input": uri(b"just a text\n" * 10)}, 415, "the content is not a JPEG, PNG or WebP"),
        ({"input": [uri(PICTURES[0]), uri(b"x" * 99)]}, 415, "image 1: the content is not"),
        (
            {"input": uri(PICTURES[0]), "modality": "audio"},
            422,
            "modality: Input should be 'image'",
        ),
        (
            {"input": uri(PICTURES[0]), "dimensions": 32},
            422,
            "have 192 dimensions and cannot be",
        ),
        ({"input": uri(PICTURES[0]), "encoding_format": "int8"}, 422, "'float' or 'base64'"),
        ({"input": uri(PICTURES[0]), "rate": 6}, 422, "runs at the rates 0 to 5"),
        ({"input": uri(PICTURES[0]), "rate": 1, "budget": 0.9}, 422, "only one may be there"),
        ({"input": uri(PICTURES[0]), "rat": 6}, 422, "rat: Extra inputs are not permitted"),
        ({"input": uri(PICTURES[0]), "model": "gpt"}, 404, "no model is called 'gpt'"),
        ({"input": [uri(PICTURES[0])] * 65}, 413, "65 or more images; at most 64"),
        ({"input": [1] * 10_000}, 413, "far more than the 64 images"),
        ({"input": "https://example.org/a.png"}, 403, "this server fetches no images"),
        (
            {"messages": [{"role": "user", "content": [part(PICTURES[0]), part(PICTURES[1])]}]},
            422,
            "get one embedding, of one image, and these hold 2",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "Embed this."}]}]},
            422,
            "messages.0.content.0.type: Input should be 'image_url'",
        ),
    ],
)
def test_what_is_refused_is_refused_in_openai_s_words(client, body, status, message):
    error = fault(client.post(PATH, json=body), status)
    assert message in error["message"]
    assert error["type"] == {404: "not_found_error", 403: "permission_error"}.get(
        status, "invalid_request_error"
    )


@pytest.mark.parametrize(
    ("sent", "status", "code"),
    [
        ({"content": b"{", "headers": {"Content-Type": "application/json"}}, 400, "bad_request"),
        ({"content": b"{}"}, 415, "unsupported_type"),
        ({"files": {"file": PICTURES[0]}}, 415, "unsupported_type"),
        (
            {"content": bytes(2**20 + 1), "headers": {"Content-Type": "application/json"}},
            413,
            "too_large",
        ),
    ],
)
def test_bodies_that_cannot_be_read(client, sent, status, code):
    assert fault(client.post(PATH, **sent), status)["code"] == code


def test_keys_are_asked_for_and_counted_in_openai_s_words(settings):
    keys = (ApiKey(name="alice", key=KEY, rate_limit=0.001, burst=2),)
    app = create_app(settings.model_copy(update={"api_keys": keys, "warmup": "none"}))
    body = {"input": [uri(PICTURES[0]), uri(PICTURES[1])]}
    with TestClient(app) as client:
        assert fault(client.post(PATH, json=body), 401)["type"] == "authentication_error"
        client.headers["Authorization"] = f"Bearer {KEY}"
        assert client.post(PATH, json=body).status_code == 200
        refused = client.post(PATH, json=body)
        assert fault(refused, 429)["type"] == "rate_limit_error"
        assert int(refused.headers["retry-after"]) > 0


def test_other_routes_keep_their_problems(client):
    answer = client.post("/v1/embed", content=b"")
    assert answer.headers["content-type"] == "application/problem+json"
    assert json.loads(answer.text)["status"] == 400


def test_the_stock_client(settings, expected):
    openai = pytest.importorskip("openai")
    with listening(create_app(settings)) as address:
        client = openai.OpenAI(base_url=f"http://{address}/v1", api_key="any", max_retries=0)
        create = partial(client.embeddings.create, model="tiny")
        uris = [*map(uri, PICTURES)]
        # Left to itself, the client asks for base64 and reads it.
        for asked in ({}, {"encoding_format": "float"}):
            answer = create(input=uris, extra_body={"rate": 3}, **asked)
            found = torch.tensor([each.embedding for each in answer.data])
            torch.testing.assert_close(found, F.normalize(expected(3)), atol=1e-5, rtol=0)
            assert [(each.index, each.rate) for each in answer.data] == [(0, 3), (1, 3), (2, 3)]
            assert answer.usage.total_tokens == 3 * 17
        (item,) = create(input=uris[0], encoding_format="base64").data
        numbers = np.frombuffer(base64.b64decode(item.embedding), dtype="<f4")
        np.testing.assert_allclose(numbers, F.normalize(expected())[0], atol=1e-5)
        with pytest.raises(openai.NotFoundError, match="no model is called 'gpt'"):
            client.embeddings.create(model="gpt", input=uris[0])
        with pytest.raises(openai.UnprocessableEntityError, match="runs at the rates 0 to 5"):
            create(input=uris[0], extra_body={"rate": 6})


def test_a_request_that_fails_is_not_among_the_times_of_answers(client):
    def answered() -> float:
        lines = client.get("/metrics").text.splitlines()
        counts = [line for line in lines if line.startswith("tocom_request_duration_seconds_count")]
        return sum(float(line.split()[-1]) for line in counts)

    before = answered()
    broken = [uri(PICTURES[0]), uri(PICTURES[1][:200])]
    assert client.post(PATH, json={"input": broken}).status_code == 422
    assert answered() == before
    assert client.post(PATH, json={"input": uri(PICTURES[0])}).status_code == 200
    assert answered() == before + 1
