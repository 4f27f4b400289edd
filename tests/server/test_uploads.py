import pytest

from tests.server.conftest import problem


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
            {"data": {"file": "photo.png"}, "files": {"x": b""}},
            400,
            "the form has a field 'x', only 'file' is read",
        ),
        (
            {"data": {"rate": "8"}, "files": {"file": b"x"}},
            400,
            "parameters go into the address: /v1/classify?rate=8",
        ),
        (
            {"files": [("file", b"x"), ("file", b"y")]},
            400,
            "Too many files. Maximum number of files is 1.",
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
            "Missing boundary in multipart",
        ),
        (
            {"data": {"file": "photo.png"}},
            415,
            "a body of type application/x-www-form-urlencoded is not read here: send the image",
        ),
        ({"json": {"file": "x"}}, 415, "a body of type application/json is not read here"),
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
