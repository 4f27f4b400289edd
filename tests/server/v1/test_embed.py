import pytest
import torch

from tests.server.conftest import problem, seen


@pytest.mark.parametrize("rate", [0, 3])
def test_the_features_are_what_the_head_reads(client, served, photo, rate):
    answer = client.post("/v1/embed", params={"rate": rate}, files={"file": photo})
    assert answer.status_code == 200, answer.text
    body = answer.json()
    features = torch.tensor(body["embedding"])
    images = seen(served, photo)[None]
    expected = served.at(rate, True)(images)[0]
    torch.testing.assert_close(features, expected.features, atol=1e-5, rtol=0)
    head = served.backbone.model.head
    torch.testing.assert_close(head(features), expected.logits, atol=1e-4, rtol=0)
    assert body["normalized"] is False


def test_the_answer_says_what_it_cost(client, served, photo):
    body = client.post("/v1/embed?rate=3&compensate=false", files={"file": photo}).json()
    told = {key: body[key] for key in ("rate", "asked_rate", "reason", "compensate", "macs")}
    assert told == {
        "rate": 3,
        "asked_rate": "3",
        "reason": "asked",
        "compensate": False,
        "macs": served.costs[3].macs,
    }


def test_normalized_features_have_length_1(client, photo):
    plain, unit = (
        torch.tensor(
            client.post(f"/v1/embed?normalize={flag}", files={"file": photo}).json()["embedding"]
        )
        for flag in (False, True)
    )
    assert float(unit.norm()) == pytest.approx(1, abs=1e-5)
    torch.testing.assert_close(unit * plain.norm(), plain, atol=1e-4, rtol=0)


def test_several_images(client, photo):
    files = [("file", photo), ("file", b"just a text\n" * 10), ("file", photo)]
    first, second, third = client.post("/v1/embed?rate=2", files=files).json()["results"]
    assert first["embedding"] == pytest.approx(third["embedding"], abs=1e-5)
    assert second["status"] == 415


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ({"top_k": 3}, "there is no parameter 'top_k'"),
        ({"normalize": "maybe"}, "normalize: Input should be a valid boolean"),
        ({"rate": 6}, "runs at the rates 0 to 5"),
    ],
)
def test_parameters_that_are_not_allowed(client, photo, query, message):
    answer = client.post("/v1/embed", params=query, files={"file": photo})
    assert answer.status_code == 422
    assert message in problem(answer)
