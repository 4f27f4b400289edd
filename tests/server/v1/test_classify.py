import json
import shutil
import threading
from concurrent.futures import Future

import pytest
import torch
from fastapi.testclient import TestClient

from adapters import Bank
from adapters.ladder import digest
from server.app import create_app
from server.settings import ModelSettings
from tests.server.conftest import CLASSES, MAX_RATE, call, picture, png, problem, seen
from tests.server.models.test_pictures import encoded, huge_png
from tests.server.works import Clock, Exact, submit_one
from tocom import TOME, forward


def ask(client: TestClient, image: bytes, **query: object):
    return client.post("/v1/classify", params=query, files={"file": ("photo.png", image)})


@pytest.mark.parametrize("rate", range(MAX_RATE + 1))
def test_the_answer_is_that_of_the_model_at_the_rate(client, served, photo, rate):
    answer = ask(client, photo, rate=rate, logits=True)
    assert answer.status_code == 200, answer.text
    body = answer.json()
    images = seen(served, photo)[None]
    expected = served.at(rate, True)(images)[0].logits
    torch.testing.assert_close(torch.tensor(body["logits"]), expected, atol=1e-4, rtol=0)
    scores, classes = expected.softmax(0).topk(5)
    assert [p["index"] for p in body["predictions"]] == classes.tolist()
    assert [p["label"] for p in body["predictions"]] == [CLASSES[i] for i in classes]
    assert [p["score"] for p in body["predictions"]] == pytest.approx(scores.tolist(), abs=1e-5)
    assert body["rate"] == rate
    assert body["compensate"] is (rate != 0)


def test_the_answer_says_what_it_cost(client, served, photo):
    body = ask(client, photo, rate=3).json()
    cost = served.costs[3]
    assert body["tokens"] == {"input": 17, "blocks": [14, 11, 8], "final": 8}
    assert body["macs"] == cost.macs
    assert body["macs_ratio"] == pytest.approx(cost.macs / served.costs[0].macs, abs=1e-4)
    assert body["source_rate"] == 0
    assert body["batch_size"] == 1
    times = body["timings_ms"]
    assert times["total"] >= times["decode"] + times["queue"] + times["inference"] > 0


def test_the_answer_names_its_bank(client, served, photo):
    assert ask(client, photo, rate=3).json()["bank_digest"] == served.bank.info.digest
    bare = ask(client, photo, rate=3, model="bare").json()
    assert bare["bank_digest"] is None
    assert bare["compensate"] is False
    assert bare["source_rate"] == 2


def test_the_default_is_the_stock_model(client, served, photo):
    body = client.post("/v1/classify", files={"file": photo}).json()
    assert (body["model"], body["rate"], body["compensate"]) == ("tiny", 0, False)
    assert len(body["predictions"]) == 5
    assert "logits" not in body


def test_without_compensation(client, served, photo):
    body = ask(client, photo, rate=4, compensate=False, logits=True).json()
    expected = forward(served.backbone.model, seen(served, photo)[None], 4)[0]
    torch.testing.assert_close(torch.tensor(body["logits"]), expected, atol=1e-4, rtol=0)
    assert body["compensate"] is False


@pytest.mark.parametrize("kind", ["image/png", "image/jpeg", "application/octet-stream", None])
def test_the_image_may_be_the_body(client, photo, kind):
    headers = {"Content-Type": kind} if kind else {}
    answer = client.post("/v1/classify", content=photo, headers=headers)
    assert answer.status_code == 200, answer.text


def test_top_k(client, photo):
    predictions = ask(client, photo, top_k=10).json()["predictions"]
    scores = [prediction["score"] for prediction in predictions]
    assert scores == sorted(scores, reverse=True)
    assert sum(scores) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("rate", ["abc", "Auto", "6", "-1", "2.5", "", "1e1"])
def test_a_rate_that_is_not_allowed(client, photo, rate):
    answer = ask(client, photo, rate=rate)
    assert answer.status_code == 422
    assert problem(answer) == (
        f"the model 'tiny' runs at the rates 0 to 5, whole numbers, or auto; got rate={rate!r}"
    )


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ({"top_k": 11}, "top_k must be in 1..10 for the model 'tiny', got 11"),
        ({"top_k": 0}, "top_k: Input should be greater than or equal to 1, got '0'"),
        ({"compensate": "maybe"}, "compensate: Input should be a valid boolean"),
        ({"rates": 3}, "there is no parameter 'rates', did you mean rate?"),
        ({"x": 3}, "there is no parameter 'x'; /docs says which there are"),
    ],
)
def test_other_parameters_that_are_not_allowed(client, photo, query, message):
    answer = ask(client, photo, **query)
    assert answer.status_code == 422
    assert message in problem(answer)


def test_an_unknown_model(client, photo):
    answer = ask(client, photo, model="nix")
    assert answer.status_code == 404
    assert problem(answer) == "no model is called 'nix'; there are: tiny, bare"


@pytest.mark.parametrize(
    ("image", "status", "message"),
    [
        (b"", 400, "the image is empty: send the image as the form field 'file'"),
        (b"just a text\n" * 10, 415, "the content is not a JPEG, PNG or WebP image"),
        (huge_png(), 413, "the image has far more than the 1,000,000 pixels that are allowed"),
        (huge_png(2000, 1000), 413, "2,000 x 1,000 = 2,000,000 pixels; at most 1,000,000"),
        (encoded(picture(0, 300, 200), "JPEG")[:-500], 422, "the image cannot be decoded"),
        (png(picture(0, 2000, 4)), 422, "its sides may differ by a factor of 100 at most"),
        (bytes(2**20), 413, "the request body is larger than the 1,048,576 bytes"),
    ],
    ids=["empty", "text", "bomb", "large", "truncated", "line", "bytes"],
)
def test_an_image_that_cannot_be_used(client, photo, image, status, message):
    answer = client.post("/v1/classify", files={"file": ("photo.jpg", image, "image/jpeg")})
    assert answer.status_code == status
    assert message in problem(answer)
    assert ask(client, photo).status_code == 200  # the server goes on


def test_an_image_of_20_000_by_1(client):
    assert ask(client, png(picture(0, 20_000, 1))).status_code == 422


def test_a_body_that_comes_in_pieces_is_limited_too(client):
    answer = client.post(
        "/v1/classify",
        content=(bytes(2**16) for _ in range(32)),
        headers={"Content-Type": "image/png"},
    )
    assert answer.status_code == 413
    assert "larger than the 1,048,576 bytes that are allowed" in problem(answer)


def test_a_full_queue(settings, photo, tiny):
    """What finds no place is refused before its body is read, and told when to come back."""
    small = settings.model_copy(update={"max_queue": 2})
    app = create_app(small)
    with TestClient(app) as client:
        engine, go = app.state.serving.engine, threading.Event()
        blockers = [submit_one(engine, Exact(), go.wait, float("inf")) for _ in range(2)]
        answer = ask(client, photo)
        assert answer.status_code == 503
        assert int(answer.headers["retry-after"]) >= 1
        assert problem(answer) == "2 of 2 places in the queue are taken; 1 would be needed"
        go.set()
        assert all(blocker.exception(60) for blocker in blockers)
        assert ask(client, photo).status_code == 200


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/classify?deadline_ms=1000", None),
        ("/v1/embed?deadline_ms=1000", None),
        ("/v1/classify/batch?deadline_ms=1000", None),
        (
            "/v2/models/tiny/infer",
            {
                "parameters": {"deadline_ms": 1000},
                "inputs": [{"name": "image", "shape": [1], "datatype": "BYTES", "data": ["AAAA"]}],
            },
        ),
    ],
)
def test_a_deadline_too_short_for_an_idle_server_is_no_full_queue(
    client, photo, monkeypatch, path, body
):
    scheduler = client.app.state.serving.engine._scheduler
    monkeypatch.setattr(scheduler, "alone", lambda work, images, late: 20.0 * images)
    sent = {"json": body} if body else {"files": {"file": ("photo.png", photo)}}
    answer = client.post(path, **sent)
    assert answer.status_code == 422
    assert "retry-after" not in answer.headers
    assert answer.json()["type"] == "urn:tocom:deadline-too-short"
    detail = problem(answer)
    assert detail.startswith("an image takes about 20 s on this server even when nothing else")
    assert "allow more time or a higher rate" in detail
    assert ("batch" in path) or detail.endswith("(the deadline was 1000 ms)")


@pytest.fixture
def silent(settings, monkeypatch):
    """An application whose engine never answers, and whose clock stands still."""
    app = create_app(settings)
    engine, app.state.futures = app.state.serving.engine, []

    def submit_all(work, prepares, deadline, due, priority):
        app.state.futures += [Future() for _ in prepares]
        return app.state.futures

    monkeypatch.setattr(engine, "clock", Clock())
    monkeypatch.setattr(engine, "submit_all", submit_all)
    return app


BODY = {"type": "http.request", "body": b"image", "more_body": False}
GONE = {"type": "http.disconnect"}


def test_a_client_that_goes_gives_its_image_up(silent):
    status, _, _ = call(silent, BODY, GONE)
    assert status == 499
    assert [future.cancelled() for future in silent.state.futures] == [True]


def test_a_client_that_goes_while_it_sends(silent):
    status, _, _ = call(silent, BODY | {"more_body": True}, GONE)
    assert status == 499
    assert silent.state.futures == []


def let_time_pass(monkeypatch, app, method):
    """Let all of a request's time pass while it calls a method of the engine."""
    engine = app.state.serving.engine
    original = getattr(engine, method)

    def slow(*arguments, **named):
        engine.clock.now += 30
        return original(*arguments, **named)

    monkeypatch.setattr(engine, method, slow)


def test_a_deadline_that_passes_gives_the_image_up(silent, monkeypatch):
    let_time_pass(monkeypatch, silent, "submit_all")
    status, body, _ = call(silent, BODY)
    assert status == 504
    assert body["detail"] == "the deadline passed before the answer was there"
    assert [future.cancelled() for future in silent.state.futures] == [True]


def test_a_body_that_does_not_come_in_time(silent, monkeypatch):
    let_time_pass(monkeypatch, silent, "check_room")
    status, body, _ = call(silent, BODY | {"more_body": True})
    assert status == 408
    assert body["detail"] == "the request body did not arrive within 30000 ms"
    assert silent.state.futures == []


def test_a_failing_forward_fails_its_request_only(settings, photo, monkeypatch, caplog):
    app = create_app(settings)
    with TestClient(app, raise_server_exceptions=False) as client:
        with monkeypatch.context() as patch:
            patch.setattr("server.models.graphs.outputs", lambda *_: 1 / 0)
            answer = ask(client, photo)
        assert answer.status_code == 500
        assert problem(answer) == "the server failed on this request; its log has the request id"
        assert answer.headers["x-request-id"] in caplog.text
        assert ask(client, photo).status_code == 200


def test_models(client, served):
    tiny, bare = client.get("/v1/models").json()["models"]
    assert (tiny["name"], tiny["max_rate"], tiny["source_rate"], tiny["classes"]) == (
        "tiny",
        MAX_RATE,
        0,
        10,
    )
    assert tiny["bank"] == {"name": "tiny", "digest": served.bank.info.digest}
    assert [rate["rate"] for rate in tiny["rates"]] == list(range(MAX_RATE + 1))
    assert tiny["rates"][0]["macs_ratio"] == 1
    assert tiny["rates"][3]["macs"] == served.costs[3].macs
    assert tiny["rates"][3]["tokens"] == 8
    assert bare["bank"] is None
    assert bare["source_rate"] == 2


def test_one_model(client, served):
    tiny = client.get("/v1/models/tiny").json()
    assert tiny["class_names"] == CLASSES
    assert tiny["input_size"] == [3, 64, 64]
    assert tiny["weights_digest"] == served.backbone.digest
    # The bank's own evaluation is of the bank, whatever model it was made with.
    assert served.bank.info.evaluation
    assert tiny["evaluation"] is None
    assert tiny["multiplier"] is None


def test_one_model_with_what_was_attached_to_it(settings, bank_folder, model_folder, tmp_path):
    folder = shutil.copytree(model_folder, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    bank = {"name": "tiny", "digest": Bank.load(bank_folder).info.digest}
    pictures = {"name": "p.tar", "count": 9}
    ladder = {"name": "of a bank", "method": "tome", "digest": digest(TOME)}
    config["calibration"] = {
        "bank_digest": bank["digest"], "source": 0, "multiplier": {"3": 0.2}, "measure": "kl",
        "pictures": pictures,
    }  # fmt: skip
    figures = {"agreement": 90.0, "kl": 0.1}
    row = {"source": 0, "target": 3, "gmacs": 1.0, "tokens": 8, "pictures": 9, "plain": figures}
    paired = {
        "agreement_won": 2, "agreement_lost": 1, "agreement_p": 1.0, "kl_change": -0.01,
        "kl_change_se": 0.02,
    }  # fmt: skip
    config["evaluation"] = {
        "model": "tiny", "weights_digest": "0123", "bank": bank, "pictures": pictures,
        "ladder": ladder, "rows": [row, row | {"multiplier": 0.2, "bank": figures | paired}],
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    model = ModelSettings(name="attached", backbone=str(folder), bank=str(bank_folder))
    with TestClient(create_app(settings.model_copy(update={"models": (model,)}))) as client:
        said = client.get("/v1/models/attached").json()
    assert said["multiplier"] == {"3": 0.2}
    assert said["evaluation"]["bank"] == bank
    assert said["evaluation"]["pictures"] == pictures
    assert said["evaluation"]["ladder"] == ladder
    assert [each["digest"] for each in said["ladders"]] == [ladder["digest"]]
    plain, repaired = said["evaluation"]["rows"]
    assert plain["plain"] == figures | {"top1": None, "map": None}
    assert plain["bank"] is None
    assert repaired["multiplier"] == 0.2
    assert repaired["bank"].items() >= (figures | paired).items()


def test_an_unknown_model_is_not_described(client):
    answer = client.get("/v1/models/nix")
    assert answer.status_code == 404
    assert problem(answer) == "no model is called 'nix'; there are: tiny, bare"


def test_health(client):
    assert client.get("/healthz").json() == {"status": "ok"}
    assert client.get("/readyz").json() == {"status": "ready"}


def test_health_of_an_engine_that_hangs(settings):
    app = create_app(settings.model_copy(update={"stall_ms": 1}))
    with TestClient(app) as client:
        begun, go = threading.Event(), threading.Event()

        def hang(images: torch.Tensor) -> torch.Tensor:
            begun.set()
            go.wait(60)
            return images.flatten(1)

        engine = app.state.serving.engine
        future = submit_one(engine, Exact(hang), lambda: torch.zeros(3, 1, 1), float("inf"))
        assert begun.wait(60)
        while engine.silence < 0.002:
            assert not future.done()
        for path in ("/healthz", "/readyz"):
            answer = client.get(path)
            assert answer.status_code == 503
            assert problem(answer) == "the engine has not answered for more than 0.001 s"
        go.set()


def test_a_stopped_engine_is_not_ready_and_takes_nothing(settings, photo):
    app = create_app(settings)
    client = TestClient(app)  # without its lifespan: the engine has never started
    answer = client.get("/readyz")
    assert answer.status_code == 503
    assert problem(answer) == "the server is not warm yet"


def test_a_server_that_is_asked_to_end_is_not_ready_and_still_answers(settings, photo):
    app = create_app(settings)
    with TestClient(app) as client:
        app.state.serving.stopping.set()
        assert problem(client.get("/readyz")) == "the server is shutting down"
        assert client.get("/healthz").status_code == 200
        assert ask(client, photo).status_code == 200


def test_nothing_there(client):
    answer = client.get("/nix")
    assert answer.status_code == 404
    assert problem(answer) == "there is nothing at /nix; /docs says what there is"


def test_another_method(client):
    answer = client.get("/v1/classify")
    assert answer.status_code == 405
    assert answer.headers["allow"] == "POST"
    assert problem(answer) == "/v1/classify takes POST, not GET"
