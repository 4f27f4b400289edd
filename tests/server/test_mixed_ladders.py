"""Ladders, methods and rates in one server at once: each image gets what it gets alone."""

import itertools
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch
from fastapi.testclient import TestClient

from server.app import create_app
from server.observe.metrics import Metrics
from tests.server.conftest import MAX_RATE, picture, png, seen
from tests.server.ladders import CLUSTERS, RINGS, UNEVEN, on_ladders
from tests.server.works import PATIENCE
from tocom import TOME, trace

PICTURES = [png(picture(seed)) for seed in range(4)]
LADDERS = (TOME, UNEVEN, RINGS, CLUSTERS)
REQUESTS = 200
THREADS = 8

#: Below this margin another rounding may merge another pair of tokens, and rightly so.
TIE = 1e-5


def test_mixed_ladders_from_eight_threads(settings, tiny, served, tmp_path, monkeypatch):
    all_there, decoded, count = threading.Event(), itertools.count(1), Metrics.decoded

    def counted(*arguments: object) -> None:
        count(*arguments)
        if next(decoded) == THREADS:
            all_there.set()

    monkeypatch.setattr(Metrics, "decoded", counted)
    model = on_ladders(tiny, tmp_path, *(ladder.name for ladder in LADDERS))
    cases = [
        (index, ladder, rate)
        for index in range(len(PICTURES))
        for ladder in LADDERS
        for rate in range((ladder.top or MAX_RATE) + 1)
    ]
    expected = {}
    for index, ladder, rate in cases:
        image = seen(served, PICTURES[index])[None]
        delta = served.delta(rate) if ladder == TOME and rate else None
        expected[index, ladder, rate] = trace(
            served.backbone.model, image, rate, delta, ladder=ladder
        )
    alike = [(index % len(PICTURES), RINGS, 2) for index in range(THREADS)]
    asked = alike + random.Random(0).choices(cases, k=REQUESTS)
    app = create_app(settings.model_copy(update={"models": (model,)}))
    with TestClient(app) as client, ThreadPoolExecutor(THREADS) as pool:

        def ask(case):
            index, ladder, rate = case
            query = {"ladder": ladder.name, "rate": rate, "logits": True}
            answer = client.post(
                "/v1/classify", params=query, files={"file": ("photo.png", PICTURES[index])}
            )
            assert answer.status_code == 200, answer.text
            return answer.json()

        # The first of each thread wait until all can run together.
        app.state.serving.engine.call(partial(all_there.wait, PATIENCE))
        answers = list(pool.map(ask, asked))
    assert max(answer["batch_size"] for answer in answers) > 1
    for case, answer in zip(asked, answers, strict=True):
        _, ladder, rate = case
        assert (answer["ladder"], answer["method"]) == (ladder.name, ladder.method.name)
        assert answer["rate"] == rate
        if float(expected[case].margin[0]) > TIE:
            logits = torch.tensor(answer["logits"])
            torch.testing.assert_close(logits, expected[case].logits[0], atol=1e-4, rtol=0)
