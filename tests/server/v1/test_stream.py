"""Streams over real connections, whose clients need not do what is good for them."""

import base64
import json
import socket

import httpx

from server.app import create_app
from server.v1.batch import PATH
from tests.server.conftest import listening, picture, png
from tests.server.works import PATIENCE

#: A small image with the longest name, most of what is told of it.
LINE = (
    json.dumps({"name": "n" * 4096, "b64": base64.b64encode(png(picture(0))).decode()}).encode()
    + b"\n"
)

#: Bytes; more than what is kept for a client and the buffers of its connection hold, by far.
MUCH = 2**28

HEAD = (
    f"POST {PATH} HTTP/1.1\r\nHost: us\r\nContent-Type: application/x-ndjson\r\n"
    f"Content-Length: {MUCH}\r\n\r\n"
)


def test_a_client_that_never_reads_is_read_no_further_and_holds_nobody_up(settings, photo):
    with (
        listening(create_app(settings)) as address,
        httpx.Client(base_url=f"http://{address}", timeout=PATIENCE) as other,
        socket.socket() as client,
    ):
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**16)
        host, port = address.split(":")
        client.connect((host, int(port)))
        client.sendall(HEAD.encode())
        client.setblocking(False)
        sent, rest, answered = 0, LINE, 0
        # Until nothing of it is taken while twenty requests of another client are answered.
        while answered < 20:
            if taken := offer(client, rest):
                sent, rest, answered = sent + taken, rest[taken:] or LINE, 0
                assert sent < MUCH / 2
            else:
                assert other.post("/v1/classify", files={"file": photo}).status_code == 200
                answered += 1


def offer(client: socket.socket, data: bytes) -> int:
    """Send what is taken at once; returns how much that was."""
    try:
        return client.send(data)
    except BlockingIOError:
        return 0
