"""Answers that are kept: for whom, for what, and how many of them."""

import pytest
import torch
from fastapi.testclient import TestClient

from server.app import create_app
from server.engine.job import Answer
from server.inference.cache import AROUND, AnswerCache, digests
from server.models.served import AutoWork, Output
from server.settings import ApiKey, Settings
from tests.server.conftest import picture, png
from tests.server.observe.test_metrics import samples

ALICE, BOB = "alice-" + "b" * 16, "bob-" + "c" * 16
KEYS = (ApiKey(name="alice", key=ALICE), ApiKey(name="bob", key=BOB))
FIRST, SECOND = digests([b"first", b"second"])


class Found:
    """Counts what was looked up."""

    hits = misses = 0

    def __call__(self, hits: int, misses: int) -> None:
        self.hits += hits
        self.misses += misses


def output(value: float = 0.0, traced: bool = False) -> Output:
    """An answer as it comes out of a batch: parts of larger tensors."""
    logits, features = torch.full((8, 10), value), torch.full((8, 64), value)
    return Output(logits[0], features[0], torch.arange(17) if traced else None)


def answer(work, value: float = 0.0) -> Answer:
    return Answer(output(value, work.trace), work, "asked", 0.1, 0.1, 0.1, batch_size=8)


def cache(limit: int = 2**20, **settings) -> AnswerCache:
    return AnswerCache(Settings(cache_bytes=limit, **settings), Found())


def test_the_same_is_found_again(served):
    kept, work = cache(), served.at(2, True)
    assert kept.find([FIRST], work, None) == [None]
    kept.keep(FIRST, answer(work, 7.0), None)
    missing, found = kept.find([SECOND, FIRST], work, None)
    assert missing is None
    assert (found.cached, found.batch_size, found.reason, found.work) == (True, 0, "asked", work)
    assert float(found.output.logits[3]) == 7.0
    assert (kept._looked_up.hits, kept._looked_up.misses) == (1, 2)


def test_nothing_else_is_found(served):
    kept, work = cache(), served.at(2, True)
    kept.keep(FIRST, answer(work), "alice")
    bare = served.with_bank(None)
    for other in (
        served.at(3, True),
        served.at(2, False),
        served.at(2, True, trace=True),
        bare.at(2, True),
        AutoWork(served, 0, 5, compensate=True),
    ):
        assert kept.find([FIRST], other, "alice") == [None]
    assert kept.find([SECOND], work, "alice") == [None]
    for caller in ("bob", None):
        assert kept.find([FIRST], work, caller) == [None]
    assert kept.find([FIRST], work, "alice") != [None]


def test_keys_may_share_it(served):
    kept, work = cache(cache_shared=True), served.at(2, True)
    kept.keep(FIRST, answer(work), "alice")
    assert kept.find([FIRST], work, "bob") != [None]


def test_an_open_rate_is_answered_at_the_lowest_one(served):
    kept = cache()
    kept.keep(FIRST, answer(served.at(1, True)), None)
    (found,) = kept.find([FIRST], AutoWork(served, 1, 5, compensate=True), None)
    assert (found.work.rate, found.reason) == (1, "quality")
    assert kept.find([FIRST], AutoWork(served, 0, 5, compensate=True), None) == [None]


def test_it_holds_what_it_may_and_the_latest_use_counts(served):
    one = AROUND + 4 * (10 + 64)
    kept, work = cache(limit=2 * one), served.at(0, True)
    pictures = digests([bytes([i]) for i in range(3)])
    for each in pictures[:2]:
        kept.keep(each, answer(work), None)
    assert kept.held == 2 * one
    kept.find(pictures[:1], work, None)
    kept.keep(pictures[2], answer(work), None)
    assert kept.held == 2 * one
    found = kept.find(pictures, work, None)
    assert [each is not None for each in found] == [True, False, True]
    kept.keep(pictures[2], answer(work), None)  # it is there already
    assert kept.held == 2 * one


def test_what_is_larger_than_all_of_it_is_not_kept(served):
    kept, work = cache(limit=AROUND), served.at(0, True)
    kept.keep(FIRST, answer(work), None)
    assert kept.held == 0
    assert kept.find([FIRST], work, None) == [None]


def test_what_is_kept_does_not_hold_its_batch(served):
    kept, work = cache(), served.at(2, True, trace=True)
    kept.keep(FIRST, answer(work), None)
    (found,) = kept.find([FIRST], work, None)
    assert found.output.logits.untyped_storage().nbytes() == 4 * 10
    assert kept.held == AROUND + 4 * (10 + 64) + 8 * 17


@pytest.fixture(scope="module")
def keeping(settings):
    """A server that keeps answers."""
    changed = {"cache_bytes": 2**20, "api_keys": KEYS, "warmup": "none"}
    with TestClient(create_app(settings.model_copy(update=changed))) as client:
        yield client


def ask(client, path="/v1/classify?rate=2", key=ALICE, **sent):
    sent = sent or {"files": {"file": png(picture(0))}}
    found = client.post(path, headers={"Authorization": f"Bearer {key}"}, **sent)
    assert found.status_code == 200, found.text
    return found


def test_answers_and_metrics_say_what_was_kept(keeping, served):
    first, second = (ask(keeping).json() for _ in range(2))
    assert (first["cached"], second["cached"]) == (False, True)
    assert second["predictions"] == first["predictions"]
    assert (second["batch_size"], second["rate"]) == (0, 2)
    assert second["bank_digest"] == served.bank_digest
    # Features are of the same run; other rates, callers and pictures are not.
    assert ask(keeping, "/v1/embed?rate=2").json()["cached"]
    assert not ask(keeping, "/v1/classify?rate=3").json()["cached"]
    assert not ask(keeping, key=BOB).json()["cached"]
    assert not ask(keeping, files={"file": png(picture(1))}).json()["cached"]
    assert not ask(keeping, "/v1/classify?rate=2&merge_map=true").json()["cached"]
    raw = ask(keeping, "/models/tiny?rate=2", content=png(picture(0)))
    assert raw.headers["x-cached"] == "true"
    assert raw.json()[0]["score"] == pytest.approx(first["predictions"][0]["score"])
    several = [("file", png(picture(seed))) for seed in (5, 0, 6)]
    results = ask(keeping, files=several).json()["results"]
    assert [each["cached"] for each in results] == [False, True, False]
    assert results[1]["predictions"] == first["predictions"]
    found = samples(keeping)
    assert found["tocom_cache_lookups_total", "hit"] == 4
    assert found["tocom_cache_lookups_total", "miss"] == 7
    assert found["tocom_cache_bytes",] == keeping.app.state.serving.cache.held > 0


def test_what_fails_is_not_kept(keeping):
    held = keeping.app.state.serving.cache.held
    for _ in range(2):
        answered = keeping.post(
            "/v1/classify",
            headers={"X-API-Key": ALICE},
            files={"file": b"just a text\n" * 9},
        )
        assert answered.status_code == 415
    assert keeping.app.state.serving.cache.held == held


def test_another_bank_is_another_answer(keeping):
    before = ask(keeping).json()
    keeping.app.state.banks.detach("tiny")
    without = ask(keeping).json()
    assert not without["cached"]
    assert without["bank_digest"] is None
    assert without["predictions"] != before["predictions"]
    assert ask(keeping).json()["cached"]


def test_by_default_nothing_is_kept(client, photo):
    answers = [client.post("/v1/classify", files={"file": photo}).json() for _ in range(2)]
    assert [each["cached"] for each in answers] == [False, False]
