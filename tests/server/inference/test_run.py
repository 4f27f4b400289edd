"""What a request may ask for: rates left to the server, deadlines, merge maps, several images."""

import pytest
from fastapi.testclient import TestClient

from server.app import create_app
from tests.server.conftest import picture, png, problem, seen


def ask(client: TestClient, image: bytes, **query: object):
    return client.post("/v1/classify", params=query, files={"file": ("photo.png", image)})


@pytest.mark.parametrize("rate", ["auto", "2"])
def test_the_answer_says_what_was_asked_and_why_it_ran_so(client, photo, rate):
    body = ask(client, photo, rate=rate).json()
    assert body["asked_rate"] == rate
    assert (body["rate"], body["reason"]) == ((0, "quality") if rate == "auto" else (2, "asked"))


def test_auto_stays_in_the_range_that_is_asked_for(client, photo):
    body = ask(client, photo, rate="auto", min_rate=2, max_rate=4).json()
    assert (body["rate"], body["reason"]) == (2, "quality")


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ({"rate": 3, "min_rate": 2}, "min_rate is for rate=auto, and the rate is '3'"),
        ({"rate": "auto", "max_rate": 6}, "max_rate must be in 0..5 for the model 'tiny', got 6"),
        (
            {"rate": "auto", "min_rate": 4, "max_rate": 3},
            "no rate is at least 4 and at most 3; this server chooses among 0 to 5",
        ),
    ],
)
def test_ranges_that_are_not_allowed(client, photo, query, message):
    answer = ask(client, photo, **query)
    assert answer.status_code == 422
    assert problem(answer) == message


def test_a_server_that_chooses_no_rates(settings, photo):
    app = create_app(settings.model_copy(update={"auto": False}))
    with TestClient(app) as client:
        answer = ask(client, photo, rate="auto")
        assert answer.status_code == 422
        assert problem(answer) == "this server does not choose rates: ask for an exact one"


def test_a_server_that_chooses_among_some_rates(settings, photo):
    policy = {"auto_min_rate": 1, "auto_max_rate": 3}
    with TestClient(create_app(settings.model_copy(update=policy))) as client:
        assert ask(client, photo, rate="auto").json()["rate"] == 1
        assert ask(client, photo, rate=5).json()["rate"] == 5  # exact ones are never changed
        answer = ask(client, photo, rate="auto", min_rate=4)
        assert "chooses among 1 to 3" in problem(answer)


def test_a_server_that_chooses_by_slackfit(settings, photo):
    other = settings.model_copy(update={"auto_policy": "slackfit"})
    with TestClient(create_app(other)) as client:
        assert ask(client, photo, rate="auto").json()["reason"] == "slack"


def test_a_deadline_of_the_request(client, photo):
    assert ask(client, photo, deadline_ms=60_000).status_code == 200
    assert "deadline_ms" in problem(ask(client, photo, deadline_ms=0))


def test_the_merge_map(client, served, photo):
    body = ask(client, photo, rate=4, merge_map=True).json()
    image = seen(served, photo)[None]
    source = served.at(4, True, trace=True)(image)[0].source
    assert body["merge_map"] == {"grid": [4, 4], "tokens": source[1:].tolist(), "dropped": 0}
    assert len(set(body["merge_map"]["tokens"])) == body["tokens"]["final"] - 1
    assert "merge_map" not in ask(client, photo, rate=4).json()


def test_several_images_are_answered_together_each_for_itself(client, photo):
    files = [("file", photo), ("file", b"nix"), ("file", png(picture(1)))]
    answer = client.post("/v1/classify", params={"rate": 3}, files=files)
    assert answer.status_code == 200
    first, second, third = answer.json()["results"]
    alone = ask(client, photo, rate=3).json()["predictions"]
    assert [each["label"] for each in first["predictions"]] == [each["label"] for each in alone]
    assert (second["status"], second["title"]) == (415, "Unsupported type")
    assert third["rate"] == 3


def test_status(client, photo):
    ask(client, photo)
    body = client.get("/v1/status").json()
    assert body["ready"] is True
    assert body["taken"] == body["queued"] == 0
    assert [model["name"] for model in body["models"]] == ["tiny", "bare"]
    assert body["images_per_second"] > 0
