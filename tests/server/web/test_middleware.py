import pytest

from server.app import create_app
from tests.server.conftest import call, problem

BODY = {"type": "http.request", "body": b"image", "more_body": False}


@pytest.fixture
def app(settings):
    return create_app(settings)


@pytest.mark.parametrize("size", ["1048577", "9" * 30, "9" * 5000])
def test_a_body_that_says_it_is_too_large_is_not_read(app, size):
    status, body, unread = call(app, BODY, headers=[("Content-Length", size)])
    assert status == 413
    assert body["detail"] == "the request body is larger than the 1,048,576 bytes that are allowed"
    assert unread == [BODY]


@pytest.mark.parametrize("length", ["-5", "many", "²"])
def test_a_length_that_is_no_number_is_counted(app, length):
    body = {"type": "http.request", "body": bytes(2**20 + 1), "more_body": False}
    status, _, unread = call(app, body, headers=[("Content-Length", length)])
    assert status == 413
    assert unread == []


@pytest.mark.parametrize("request_id", ["abc", "0b6c9a58-2f4e:1", "x" * 128])
def test_a_request_id_is_echoed(client, photo, request_id):
    answer = client.post(
        "/v1/classify", files={"file": photo}, headers={"X-Request-Id": request_id}
    )
    assert answer.headers["x-request-id"] == request_id
    assert answer.json()["request_id"] == request_id


@pytest.mark.parametrize("request_id", ["", "a b", "<script>", "x" * 129])
def test_a_request_id_that_is_not_plain_is_replaced(client, request_id):
    answer = client.get("/nix", headers={"X-Request-Id": request_id})
    assert len(answer.headers["x-request-id"]) == 32
    problem(answer)


def test_without_a_request_id_each_request_gets_its_own(client):
    first, second = (client.get("/healthz").headers["x-request-id"] for _ in range(2))
    assert len(first) == 32
    assert first != second
