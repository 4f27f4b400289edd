"""Many clients at once over real HTTP: each gets what its image gets alone."""

import random
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import httpx
import pytest
import torch
from torch import Tensor

from server.app import create_app
from server.observe.metrics import Metrics
from tests.server.conftest import MAX_RATE, listening, picture, png, seen
from tests.server.works import PATIENCE
from tocom import trace
from tocom.backbones import weights_digest

PICTURES = [png(picture(seed)) for seed in range(8)]
REQUESTS = 200
THREADS = 8

#: Below this margin another rounding may merge another pair of tokens, and rightly so.
TIE = 1e-5


@dataclass(frozen=True)
class Expected:
    """What one image gets by itself."""

    logits: Tensor
    tied: bool

    def agrees(self, logits: Tensor) -> bool:
        """Compare with what came over HTTP."""
        gap = float((logits - self.logits).abs().max())
        if self.tied:
            return gap <= 0.05 or bool(logits.argmax() == self.logits.argmax())
        return gap <= 1e-4


def alone(served, data: bytes, rate: int, compensate: bool) -> Expected:
    image = seen(served, data)[None]
    delta = served.delta(rate) if compensate and rate != served.source else None
    traced = trace(served.backbone.model, image, rate, delta)
    return Expected(traced.logits[0], bool(traced.margin[0] < TIE))


@pytest.fixture
def decoded(monkeypatch) -> threading.Semaphore:
    """One for each image that is decoded from now on."""
    decoded, count = threading.Semaphore(0), Metrics.decoded

    def counted(*arguments: object) -> None:
        count(*arguments)
        decoded.release()

    monkeypatch.setattr(Metrics, "decoded", counted)
    return decoded


def test_mixed_rates_from_eight_threads(settings, served, decoded):
    app = create_app(settings)
    cases = [
        (index, rate, compensate)
        for index in range(len(PICTURES))
        for rate in range(MAX_RATE + 1)
        for compensate in (True, False)
    ]
    expected = {case: alone(served, PICTURES[case[0]], *case[1:]) for case in cases}
    alike = [(index, MAX_RATE, True) for index in range(THREADS)]
    asked = alike + random.Random(0).choices(cases, k=REQUESTS)
    model = app.state.serving.models.get("tiny").backbone.model
    digest = weights_digest(model)
    sizes: set[int] = set()

    with (
        listening(app) as address,
        httpx.Client(base_url=f"http://{address}", timeout=PATIENCE) as client,
    ):

        def ask(case: tuple[int, int, bool]) -> Tensor:
            index, rate, compensate = case
            answer = client.post(
                "/v1/classify",
                params={"rate": rate, "compensate": compensate, "logits": True},
                files={"file": PICTURES[index]},
            )
            assert answer.status_code == 200, answer.text
            body = answer.json()
            assert (body["rate"], body["compensate"]) == (rate, compensate and rate != 0)
            sizes.add(body["batch_size"])
            return torch.tensor(body["logits"])

        at_source = [ask((index, 0, True)) for index in range(len(PICTURES))]
        with ThreadPoolExecutor(THREADS) as pool:
            # The forward is held until those that are alike wait for it: they run together.
            go = threading.Event()
            app.state.serving.engine.call(partial(go.wait, PATIENCE))
            answering = pool.map(ask, asked)
            for _ in range(len(PICTURES) + THREADS):
                assert decoded.acquire(timeout=PATIENCE)
            go.set()
            answers = list(answering)
        returned = [ask((index, 0, True)) for index in range(len(PICTURES))]

    wrong = [c for c, logits in zip(asked, answers, strict=True) if not expected[c].agrees(logits)]
    assert wrong == []
    assert sum(expected[case].tied for case in asked) < 0.01 * REQUESTS
    assert max(sizes) > 1

    assert weights_digest(model) == digest
    for index, data in enumerate(PICTURES):
        stock = model(seen(served, data)[None])[0]
        torch.testing.assert_close(at_source[index], stock)
        assert torch.equal(returned[index], at_source[index])
