import asyncio
import base64
import json

import pytest
from fastapi.testclient import TestClient
from starlette.requests import Request

from server.app import create_app
from server.errors import TooLargeError
from server.models.pictures import prepare
from server.settings import Settings
from server.v1 import running
from server.v1.uploads import EncodedImages, Upload, read_images
from tests.server.conftest import problem

FORM = {"Content-Type": "multipart/form-data; boundary=b"}


def part(data: bytes, name: str | None = "file", filename: str = "photo.png") -> bytes:
    field = "" if name is None else f'; name="{name}"'
    head = f'--b\r\nContent-Disposition: form-data{field}; filename="{filename}"\r\n\r\n'
    return head.encode() + data + b"\r\n"


def nested(depth: int) -> list:
    return json.loads("[" * depth + "]" * depth)


@pytest.mark.parametrize(
    ("request_", "status", "message"),
    [
        ({}, 400, "the request body is empty: send the image as the form field 'file'"),
        ({"content": b""}, 400, "the request body is empty"),
        (
            {"content": b"", "headers": {"Content-Type": "image/png"}},
            400,
            "the request body is empty",
        ),
        (
            {"files": {"x": b""}},
            400,
            "the form has a field 'x', only 'file' is read",
        ),
        (
            {"data": {"rate": "8"}, "files": {"file": b"x"}},
            400,
            "parameters go into the address: /v1/classify?rate=2",
        ),
        (
            {"files": [("file", b"x")] * 65},
            413,
            "the request has 65 or more images; at most 64 are answered together, any number by",
        ),
        (
            {"files": {"file": (None, b"photo.png")}},
            400,
            "the form field 'file' holds text instead of a file",
        ),
        (
            {
                "content": b"--b--\r\n",
                "headers": {"Content-Type": "multipart/form-data; boundary=b"},
            },
            400,
            "the form has no field 'file'",
        ),
        (
            {"content": b"x", "headers": {"Content-Type": "multipart/form-data"}},
            400,
            "the form's Content-Type names no boundary",
        ),
        ({"content": b"junk", "headers": FORM}, 400, "the form cannot be read: Expected boundary"),
        ({"content": part(b"x"), "headers": FORM}, 400, "the form ends before its closing"),
        (
            {"content": part(b"x", name=None) + b"--b--\r\n", "headers": FORM},
            400,
            "the form cannot be read: Field name not found",
        ),
        (
            {"data": {"file": "photo.png"}},
            415,
            "a body of type application/x-www-form-urlencoded is not read here: send the image",
        ),
        ({"json": {"file": "x"}}, 422, 'Field required; it is {"images": ['),
        ({"json": []}, 422, "the body: Input should be"),
        ({"json": {"images": []}}, 422, "images: List should have at least 1 item"),
        ({"json": {"images": ["AA=="] * 65}}, 413, "the request has 65 or more images"),
        ({"json": {"images": ["AA==", "A"]}}, 422, "images.1.b64: this is not base64"),
        ({"json": {"images": ["ä"]}}, 422, "images.0.b64: this is not base64"),
        ({"json": {"images": [1]}}, 422, "images.0: Input should be"),
        ({"json": {"images": [{"b64": 1}]}}, 422, "images.0.b64: Input should be a valid bytes"),
        ({"json": {"images": [{"b64": "AA==", "x": 1}]}}, 422, "images.0.x: Extra inputs"),
        (
            {"json": {"images": ["data:image/png,AA=="]}},
            422,
            "images.0.b64: a data: URL of an image must hold ;base64,",
        ),
        (
            {"content": b"{", "headers": {"Content-Type": "application/json"}},
            400,
            "the body is not JSON: Invalid JSON: EOF",
        ),
        (
            {"content": b"[" * 10**5, "headers": {"Content-Type": "application/json"}},
            400,
            "the body is not JSON: Invalid JSON: recursion limit exceeded",
        ),
        ({"json": {"images": [nested(150)]}}, 422, "images.0: Input should be an object"),
        (
            {"content": iter([b""]), "headers": {"Content-Type": "image/png"}},
            400,
            "the image is empty",
        ),
    ],
)
def test_bodies_that_hold_no_image(client, request_, status, message):
    answer = client.post("/v1/classify", **request_)
    assert answer.status_code == status
    assert message in problem(answer)


def read(body: bytes, kind: str, piece: int = 7, **settings: int) -> Upload:
    """Read a body that arrives in pieces of so many bytes."""
    pieces = [body[start : start + piece] for start in range(0, len(body), piece)]

    async def receive():
        more = len(pieces) > 1
        return {"type": "http.request", "body": pieces.pop(0), "more_body": more}

    scope = {"type": "http", "headers": [(b"content-type", kind.encode())]}
    return asyncio.run(read_images(Request(scope, receive), Settings(**settings)))


def test_one_file_is_a_single_image():
    upload = read(part(b"one") + b"--b--\r\n", FORM["Content-Type"])
    assert upload == Upload([b"one"], single=True)


def test_several_files_in_their_order():
    body = part(b"one", filename="ä.png") + part(b"", filename="") + part(b"2" * 99) + b"--b--\r\n"
    upload = read(body, FORM["Content-Type"])
    assert upload == Upload([b"one", b"", b"2" * 99], single=False)


@pytest.mark.parametrize("kind", ["", "image/png", "Application/Octet-Stream; x=y"])
def test_a_body_is_a_single_image(kind):
    assert read(b"some bytes", kind) == Upload([b"some bytes"], single=True)


@pytest.mark.parametrize(
    "text", ["b25l", "b2\n5l", " b25l ", "data:image/png;base64,b25l", "data:;base64,b25l"]
)
def test_base64_in_json(text):
    body = json.dumps({"images": [text, {"b64": text, "name": "n"}, {"b64": ""}]})
    upload = read(body.encode(), "application/json; charset=utf-8")
    assert upload == Upload([b"one", b"one", b""], single=False)


def test_one_image_in_json_is_answered_as_several_would_be():
    assert read(b'{"images": ["b25l"]}', "application/json").single is False


def test_images_for_which_the_queue_has_no_places_are_not_read():
    body = 3 * part(b"x") + b"--b--"
    with pytest.raises(TooLargeError, match="has 3 or more images; at most 2 are answered"):
        read(body, FORM["Content-Type"], max_queue=2)


def test_a_form_is_read_no_further_than_the_last_image_allowed():
    unread = 10 * part(b"x" * 100)
    body = 3 * part(b"x") + unread
    arrived = []

    async def receive():
        arrived.append(body[len(arrived) * 50 : (len(arrived) + 1) * 50])
        return {"type": "http.request", "body": arrived[-1], "more_body": True}

    scope = {"type": "http", "headers": [(b"content-type", FORM["Content-Type"].encode())]}
    with pytest.raises(TooLargeError):
        asyncio.run(read_images(Request(scope, receive), Settings(max_images=2)))
    assert len(b"".join(arrived)) < len(body) - len(unread) + 50


def test_several_images_are_answered_together(client, photo):
    broken = photo[:100]
    encoded = [base64.b64encode(data).decode() for data in (photo, broken, photo)]
    files = [("file", data) for data in (photo, broken, photo)]
    for request in ({"json": {"images": encoded}}, {"files": files}):
        answer = client.post("/v1/classify?rate=3", **request)
        assert answer.status_code == 200, answer.text
        first, second, third = answer.json()["results"]
        assert first["predictions"] == third["predictions"]
        assert first["rate"] == 3
        assert second["status"] == 422
        assert "cannot be decoded" in second["detail"]


def test_an_error_of_ours_fails_its_own_image_alone(client, photo, monkeypatch, caplog):
    def fail(data, *_):
        if len(data) == 100:
            raise RuntimeError("a bug")
        return prepare(data, *_)

    monkeypatch.setattr(running, "prepare", fail)
    files = [("file", data) for data in (photo, photo[:100])]
    answer = client.post("/v1/classify", files=files)
    assert answer.status_code == 200, answer.text
    first, second = answer.json()["results"]
    assert first["predictions"]
    assert second["status"] == 500
    assert second["detail"] == "the server failed on this request; its log has the request id"
    assert "a bug" in caplog.text
    assert second["request_id"] in caplog.text


@pytest.mark.parametrize("entry", [b"0", b"{}", b'""', b"null"])
def test_a_list_of_many_faults_is_described_once(client, entry):
    body = b'{"images": [' + b",".join([entry] * 4000) + b"]}"
    answer = client.post("/v1/classify", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code in (413, 422)
    assert len(problem(answer)) < 300


def test_a_list_far_too_long_is_refused_unparsed(client, monkeypatch):
    def parsed(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr(EncodedImages, "model_validate_json", parsed)
    body = b'{"images": [' + b"0," * 100_000 + b"0]}"
    answer = client.post("/v1/classify", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 413
    assert "far more than the 64 images" in problem(answer)


@pytest.fixture(scope="module")
def compressing(settings):
    """A client with all rights that says of all its bodies that they are compressed."""
    admin = Settings(admin_key="k" * 16).admin_key
    headers = {"X-API-Key": "k" * 16, "Content-Encoding": "gzip"}
    app = create_app(settings.model_copy(update={"admin_key": admin, "warmup": "none"}))
    with TestClient(app, headers=headers) as client:
        yield client


@pytest.mark.parametrize(
    ("method", "path", "request_"),
    [
        ("POST", "/v1/classify", {"content": b"x"}),
        ("POST", "/v1/embed", {"json": {"images": []}}),
        ("POST", "/v1/embed", {"files": {"file": b"x"}}),
        ("POST", "/v1/classify/batch", {"files": {"file": b"x"}}),
        ("POST", "/v1/embeddings", {"json": {"input": "x"}}),
        ("POST", "/models/tiny", {"json": {"inputs": "x"}}),
        ("POST", "/models/tiny", {"content": b"x"}),
        ("POST", "/v1/banks", {"files": {"info": b"x"}}),
        ("PUT", "/v1/models/tiny/bank", {"json": {"bank": "x"}}),
    ],
)
def test_a_compressed_body_is_refused(compressing, method, path, request_):
    answer = compressing.request(method, path, **request_)
    assert answer.status_code == 415
    assert "a body is read here as it is, not gzip; send it without" in answer.text


def test_a_body_may_say_that_it_is_not_compressed(client, photo):
    headers = {"Content-Encoding": "identity"}
    assert client.post("/v1/classify", content=photo, headers=headers).status_code == 200
