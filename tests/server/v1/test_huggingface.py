"""Image classification as Hugging Face's clients ask for it."""

import base64

import pytest
import torch
from huggingface_hub import InferenceClient
from huggingface_hub.errors import HfHubHTTPError

from server.app import create_app
from tests.server.conftest import CLASSES, listening, picture, png, problem, seen

PHOTO = png(picture(0))
B64 = base64.b64encode(PHOTO).decode()
PATH = "/models/tiny"


@pytest.fixture(scope="module")
def address(settings):
    with listening(create_app(settings)) as address:
        yield f"http://{address}"


@pytest.fixture(scope="module")
def logits(served):
    image = seen(served, PHOTO)[None]

    def logits(rate: int = 0) -> torch.Tensor:
        with torch.inference_mode():
            return served.at(rate, True)(image)[0].logits

    return logits


def check(found: list, scores: torch.Tensor) -> None:
    """Compare labels and scores with the highest of all scores."""
    best = scores.topk(len(found))
    assert [label for label, _ in found] == [CLASSES[index] for index in best.indices]
    torch.testing.assert_close(
        torch.tensor([score for _, score in found]), best.values, atol=1e-4, rtol=0
    )


def test_the_stock_client_sends_bytes(address, logits, tmp_path):
    client = InferenceClient(model=f"{address}{PATH}", token="any")
    found = client.image_classification(PHOTO)
    check([(each.label, each.score) for each in found], logits().softmax(-1))
    assert len(found) == 5
    file = tmp_path / "photo.png"
    file.write_bytes(PHOTO)
    assert client.image_classification(file) == found


@pytest.mark.parametrize("function", ["softmax", "sigmoid", "none"])
def test_the_stock_client_sends_parameters(address, logits, function):
    client = InferenceClient(model=f"{address}{PATH}?rate=3", token="any")
    found = client.image_classification(PHOTO, top_k=2, function_to_apply=function)
    said = {"softmax": lambda x: x.softmax(-1), "sigmoid": torch.sigmoid, "none": lambda x: x}
    assert len(found) == 2
    check([(each.label, each.score) for each in found], said[function](logits(3)))


def test_the_stock_client_raises_what_is_refused(address):
    client = InferenceClient(model=f"{address}/models/gpt", token="any")
    with pytest.raises(HfHubHTTPError, match="404"):
        client.image_classification(PHOTO)


def test_the_answer_says_what_ran(client, served, logits):
    body = {"inputs": B64, "parameters": {"rate": 2, "top_k": 1}}
    answer = client.post(f"{PATH}?rate=4&deadline_ms=60000", json=body)
    check([(each["label"], each["score"]) for each in answer.json()], logits(2).softmax(-1))
    assert answer.headers["x-rate"] == "2"
    assert answer.headers["x-reason"] == "asked"
    assert answer.headers["x-bank-digest"] == served.bank_digest
    assert "x-bank-digest" not in client.post("/models/bare", content=PHOTO).headers


def test_a_file_is_read_as_curl_sends_it(client):
    curl = {"Content-Type": "application/x-www-form-urlencoded"}
    raw = client.post(PATH, content=PHOTO).json()
    assert client.post(PATH, content=PHOTO, headers=curl).json() == raw
    assert client.post(PATH, content=b"", headers=curl).status_code == 400


def test_a_data_uri_is_read_too(client):
    raw = client.post(PATH, content=PHOTO).json()
    sent = {"inputs": f"data:image/png;base64,{B64}"}
    assert client.post(PATH, json=sent).json() == raw


@pytest.mark.parametrize(
    ("sent", "status", "message"),
    [
        ({"content": b""}, 400, "the request body is empty"),
        ({"content": b"just a text\n" * 9}, 415, "the content is not a JPEG, PNG or WebP"),
        ({"files": {"file": PHOTO}}, 415, "a form is not read here"),
        ({"content": b"x", "headers": {"Content-Type": "text/plain"}}, 415, "is not read here"),
        ({"json": {"inputs": "ä"}}, 422, "inputs: this is not base64"),
        ({"json": {}}, 422, "the body's inputs: Field required"),
        ({"json": {"inputs": [B64]}}, 422, "inputs"),
        ({"json": {"inputs": B64, "parameters": {"top_k": 11}}}, 422, "top_k must be in 1..10"),
        ({"json": {"inputs": B64, "parameters": {"rate": 6}}}, 422, "the rates 0 to 5"),
        ({"json": {"inputs": B64, "parameters": {"rat": 6}}}, 422, "parameters.rat: Extra"),
        ({"json": {"inputs": B64, "parameters": {"function_to_apply": "x"}}}, 422, "'softmax'"),
        ({"json": {"inputs": "https://example.org/a.png"}}, 403, "fetches no images"),
        ({"content": PHOTO, "params": {"model": "bare"}}, 422, "there is no parameter 'model'"),
        ({"content": PHOTO, "params": {"top_k": 0}}, 422, "top_k: Input should be greater"),
    ],
)
def test_what_is_refused(client, sent, status, message):
    answer = client.post(PATH, **sent)
    assert answer.status_code == status, answer.text
    assert message in problem(answer)
