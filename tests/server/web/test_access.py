import asyncio
from types import SimpleNamespace

import pytest
from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.testclient import TestClient

from server.engine.turns import HIGH, NORMAL
from server.errors import QuotaError
from server.settings import ApiKey, Settings, load_settings
from server.web.access import (
    Access,
    charge,
    charge_when_allowed,
    priority_of,
    require_admin,
    require_api_key,
)
from server.web.middleware import RequestId
from server.web.problems import add_handlers
from tests.server.conftest import problem
from tocom import ConfigError

ADMIN, ALICE, BOB = "admin-" + "a" * 16, "alice-" + "b" * 16, "bob-" + "c" * 16
KEYS = (
    ApiKey(name="alice", key=ALICE, rate_limit=2, burst=3),
    ApiKey(name="bob", key=BOB),
)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def client(settings: Settings, clock: Clock | None = None) -> TestClient:
    """A server of nothing but doors."""
    router = APIRouter()

    @router.get("/infer", dependencies=[Depends(require_api_key)])
    async def infer(request: Request, images: int = 1) -> str:
        charge(request, images - 1)
        return "inferred"

    @router.get("/change", dependencies=[Depends(require_admin)])
    async def change() -> str:
        return "changed"

    app = FastAPI()
    app.state.access = Access(settings, clock or Clock())
    app.include_router(router)
    add_handlers(app)
    app.add_middleware(RequestId)
    return TestClient(app)


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def test_without_api_keys_inference_is_open():
    assert client(Settings()).get("/infer").json() == "inferred"


@pytest.mark.parametrize(
    "headers", [bearer(BOB), {"Authorization": f"bearer {BOB}"}, {"X-API-Key": BOB}]
)
def test_an_api_key_opens_inference(headers):
    assert client(Settings(api_keys=KEYS)).get("/infer", headers=headers).json() == "inferred"


@pytest.mark.parametrize(
    "headers",
    [
        {},
        bearer(""),
        bearer(BOB[:-1]),
        bearer(BOB + "c"),
        bearer(ADMIN),
        {"Authorization": BOB},
        {"Authorization": f"Basic {BOB}"},
        {"X-API-Key": ""},
        {"X-API-Key": "schlüssel".encode()},
    ],
)
def test_without_one_it_is_closed(headers):
    answer = client(Settings(api_keys=KEYS, admin_key=ADMIN)).get("/infer", headers=headers)
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"] == "Bearer"
    assert "API key" in problem(answer)


@pytest.mark.parametrize("headers", [bearer(ADMIN), {"X-API-Key": ADMIN}])
def test_the_admin_key_opens_what_changes(headers):
    assert client(Settings(admin_key=ADMIN)).get("/change", headers=headers).json() == "changed"


@pytest.mark.parametrize("headers", [{}, bearer(BOB), bearer(ADMIN[:-1])])
def test_no_other_key_does(headers):
    answer = client(Settings(api_keys=KEYS, admin_key=ADMIN)).get("/change", headers=headers)
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"] == "Bearer"
    assert "needs the admin key" in problem(answer)


@pytest.mark.parametrize("headers", [{}, bearer(ADMIN)])
def test_without_an_admin_key_nothing_is_changed(headers):
    answer = client(Settings()).get("/change", headers=headers)
    assert answer.status_code == 403
    assert "until the setting `admin_key` is set" in problem(answer)


def test_a_caller_gets_its_burst_then_its_rate(clock):
    alice = client(Settings(api_keys=KEYS), clock)
    alice.headers = bearer(ALICE)
    assert [alice.get("/infer").status_code for _ in range(4)] == [200, 200, 200, 429]
    answer = alice.get("/infer")
    assert problem(answer) == (
        "the key 'alice' allows 2 images a second, 3 at once; the next one in 0.5 s"
    )
    assert answer.headers["retry-after"] == "1"
    clock.now += 0.5
    assert [alice.get("/infer").status_code for _ in range(2)] == [200, 429]
    clock.now += 3600
    assert [alice.get("/infer").status_code for _ in range(4)] == [200, 200, 200, 429]


def test_callers_do_not_share_their_quota():
    shared = client(Settings(api_keys=KEYS))
    assert [shared.get("/infer", headers=bearer(ALICE)).status_code for _ in range(4)][-1] == 429
    assert {shared.get("/infer", headers=bearer(BOB)).status_code for _ in range(20)} == {200}


def test_who_was_let_in_with_many_images_waits_for_them_afterwards(clock):
    alice = client(Settings(api_keys=KEYS), clock)
    alice.headers = bearer(ALICE)
    assert alice.get("/infer", params={"images": 9}).status_code == 200  # 6 more than its burst
    answer = alice.get("/infer")
    assert answer.status_code == 429
    assert answer.headers["retry-after"] == "4"  # 3.5 s
    clock.now += 3.5
    assert [alice.get("/infer").status_code for _ in range(2)] == [200, 429]


def test_images_that_are_charged_late_are_not_forgiven(clock):
    access = Access(Settings(api_keys=KEYS), clock)
    caller = access.admit(ALICE)
    clock.now += 60  # as long as the body took to arrive: the bucket is full again
    caller.bucket.take(3)
    with pytest.raises(QuotaError):
        access.admit(ALICE)


def test_the_default_burst_is_one_second_and_at_least_an_image(clock):
    for rate, images in ((5, 5), (0.1, 1)):
        access = Access(Settings(api_keys=[ApiKey(name="a", key=ALICE, rate_limit=rate)]), clock)
        for _ in range(images):
            access.admit(ALICE)
        with pytest.raises(QuotaError, match="the next one in"):
            access.admit(ALICE)


def test_a_key_has_a_priority():
    keys = (ApiKey(name="alice", key=ALICE, priority="high"), ApiKey(name="bob", key=BOB))
    access = Access(Settings(api_keys=keys))
    request = Request({"type": "http", "state": {}})
    assert priority_of(request) == NORMAL
    for key, priority in ((ALICE, HIGH), (BOB, NORMAL)):
        request.state.caller = access.admit(key)
        assert priority_of(request) == priority
    with pytest.raises(ConfigError, match=r"setting api_keys\.0\.priority must be"):
        load_settings(api_keys=[{"name": "a", "key": ALICE, "priority": "urgent"}])


def test_keys_are_not_shown(caplog):
    settings = Settings(api_keys=KEYS, admin_key=ADMIN)
    shown = [repr(settings), str(settings), settings.model_dump_json(), repr(Access(settings))]
    with caplog.at_level("DEBUG"):
        for path, key in (("/infer", ALICE), ("/infer", ADMIN), ("/change", BOB)):
            shown += [client(settings).get(path, headers=bearer(key)).text for _ in range(4)]
    for key in (ADMIN, ALICE, BOB):
        assert key not in "".join(shown) + caplog.text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"admin_key": "hunter2"}, "setting admin_key: .* 16 or more printable ASCII"),
        ({"admin_key": "hunter2 " * 5}, "setting admin_key: .* without spaces"),
        ({"admin_key": ["hunter2"]}, "setting admin_key must be a text"),
        ({"api_keys": "hunter2"}, "setting api_keys must be a list"),
        ({"api_keys": [{"key": "hunter2" * 5}]}, r"setting api_keys\.0\.name is missing"),
        ({"api_keys": [{"name": "a", "key": "hunter2"}]}, r"api_keys\.0\.key: .* 16 or more"),
        ({"api_keys": [{"name": "a", "kye": "hunter2"}]}, r"api_keys\.0\.key is missing"),
        (
            {"api_keys": [{"name": "a", "key": "hunter2" * 5, "burst": 3}]},
            r"api_keys\.0\.burst: .* needs a rate_limit",
        ),
        (
            {"api_keys": [{"name": n, "key": "hunter2" * 5} for n in "ab"]},
            "setting api_keys: .*two keys are the same",
        ),
        (
            {"api_keys": [{"name": "a", "key": f"{k}hunter2" * 5} for k in "ab"]},
            "setting api_keys: .*two keys have the same name",
        ),
        (
            {
                "admin_key": "hunter2" * 5,
                "api_keys": [{"name": "a", "key": "hunter2" * 5}],
            },
            "the admin key must also be one of its own",
        ),
    ],
)
def test_faulty_keys_are_refused_and_not_shown(arguments, message):
    with pytest.raises(ConfigError, match=message) as raised:
        load_settings(**arguments)
    shown: BaseException | None = raised.value
    while shown:
        assert "hunter2" not in str(shown)
        shown = shown.__cause__


def test_a_key_comes_from_the_environment(monkeypatch):
    monkeypatch.setenv("TOCOM_ADMIN_KEY", ADMIN)
    monkeypatch.setenv("TOCOM_API_KEYS", f'[{{"name": "bob", "key": "{BOB}"}}]')
    settings = load_settings()
    assert settings.admin_key.get_secret_value() == ADMIN
    assert settings.api_keys == (ApiKey(name="bob", key=BOB),)


def test_keys_in_the_environment_that_cannot_be_read_are_not_shown(monkeypatch):
    monkeypatch.setenv("TOCOM_API_KEYS", "hunter2")
    with pytest.raises(
        ConfigError, match="variable TOCOM_API_KEYS must be a list as JSON"
    ) as raised:
        load_settings()
    assert "hunter2" not in str(raised.value)


def test_what_may_wait_is_charged_when_the_quota_allows(clock, monkeypatch):
    naps = []

    async def nap(seconds):
        naps.append(seconds)
        clock.now += seconds

    monkeypatch.setattr("server.web.access.asyncio", SimpleNamespace(sleep=nap))
    request = Request({"type": "http", "state": {}})
    request.state.caller = Access(Settings(api_keys=KEYS), clock).admit(ALICE)
    for _ in range(4):
        asyncio.run(charge_when_allowed(request))
    # Three at once, of which one at the door; the others at two a second.
    assert naps == pytest.approx([0.5, 0.5])


def test_who_has_no_quota_does_not_wait():
    request = Request({"type": "http", "state": {}})
    asyncio.run(charge_when_allowed(request))
    request.state.caller = Access(Settings(api_keys=KEYS)).admit(BOB)
    asyncio.run(charge_when_allowed(request))
