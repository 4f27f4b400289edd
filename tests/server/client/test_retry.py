"""When a call is tried again, by a clock that stands still."""

from types import SimpleNamespace

import httpx
import pytest

from server.client import calls
from server.client.retry import BACKOFF, Tries

GONE = httpx.ReadError("gone")


@pytest.fixture
def clock(monkeypatch) -> SimpleNamespace:
    clock = SimpleNamespace(now=100.0)
    clock.monotonic = lambda: clock.now
    monkeypatch.setattr("server.client.retry.time", clock)
    monkeypatch.setattr("server.client.retry.random.uniform", lambda low, high: low)
    return clock


def tries(retries: int = 9, timeout: float = 60.0, **options) -> Tries:
    return Tries(calls.classify(b"photo", options), retries, timeout)


def answer(status_code: int, **headers: str) -> httpx.Response:
    request = httpx.Request("POST", "http://host/v1/classify")
    return httpx.Response(status_code, headers=headers, request=request)


def full() -> httpx.Response:
    return answer(503, **{"Retry-After": "7"})


def test_a_loss_is_waited_for_twice_as_long_as_the_one_before(clock):
    made = tries()
    assert [made.after_loss(GONE) / BACKOFF for _ in range(4)] == [1, 2, 4, 8]
    assert made.call.params == {}


def test_losses_and_refusals_use_up_the_same_retries(clock):
    made = tries(retries=2)
    made.after_loss(GONE)
    assert made.after_refusal(full()) == 7
    with pytest.raises(httpx.ReadError, match="gone"):
        made.after_loss(GONE)
    with pytest.raises(calls.ToComServerError, match="503"):
        made.after_refusal(full())


def test_what_is_lost_is_not_asked_again_past_the_timeout(clock):
    made = tries(timeout=5)
    clock.now += 4.8
    made.after_loss(GONE)
    with pytest.raises(httpx.ReadError, match="gone"):
        made.after_loss(GONE)


def test_what_is_asked_again_has_what_is_left_of_its_deadline(clock):
    made = tries(deadline_ms=1000, rate=8)
    clock.now += 0.5
    made.after_loss(GONE)
    assert made.call.params == {"deadline_ms": 400, "rate": 8}
    clock.now += 0.3
    with pytest.raises(httpx.ReadError, match="gone"):
        made.after_loss(GONE)


def test_a_request_after_a_refusal_has_all_of_its_time(clock):
    made = tries(deadline_ms=1000)
    clock.now += 0.5
    made.after_loss(GONE)
    made.after_refusal(full())
    assert made.call.params == {"deadline_ms": 1000}
    clock.now += 7.5
    assert made.after_loss(GONE) == 2 * BACKOFF
    assert made.call.params == {"deadline_ms": 300}


@pytest.mark.parametrize("status", [500, 502])
def test_a_proxy_that_lost_its_server_is_a_loss(clock, status):
    made = tries(retries=2)
    text = {"Content-Type": "text/plain; charset=utf-8"}
    assert [made.after_refusal(answer(status, **text)) / BACKOFF for _ in range(2)] == [1, 2]
    with pytest.raises(calls.ToComServerError, match=str(status)):
        made.after_refusal(answer(status, **text))


@pytest.mark.parametrize(
    ("status", "kind"), [(500, "application/problem+json"), (504, "text/html")]
)
def test_what_will_not_pass_is_not_asked_again(clock, status, kind):
    with pytest.raises(calls.ToComServerError, match=str(status)):
        tries().after_refusal(answer(status, **{"Content-Type": kind}))
