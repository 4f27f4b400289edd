"""The clients, against a real server and against answers made up for them."""

import asyncio
import io
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from inspect import signature
from types import SimpleNamespace

import httpx
import pytest
from PIL import ExifTags, Image

from server.app import create_app
from server.client import AsyncClient, Client, ToComServerError
from server.client.retry import LOST
from server.schemas import Classification, Embedding, Problem
from tests.server.conftest import listening, picture, png
from tests.server.works import PATIENCE


@pytest.fixture(scope="module")
def address(settings) -> Iterator[str]:
    with listening(create_app(settings)) as address:
        yield f"http://{address}"


@pytest.fixture
def client(address) -> Iterator[Client]:
    with Client(address) as client:
        yield client


def run(address, use):
    """Let `use` have an asynchronous client."""

    async def main():
        async with AsyncClient(address) as client:
            return await use(client)

    return asyncio.run(main())


def test_an_image_may_be_a_path_bytes_or_a_picture(client, photo, tmp_path):
    path = tmp_path / "photo.png"
    path.write_bytes(photo)
    forms = [path, str(path), photo, Image.open(io.BytesIO(photo)), picture(0).convert("CMYK")]
    answers = [client.classify(form, rate=3, logits=True) for form in forms]
    assert all(isinstance(answer, Classification) for answer in answers)
    for answer in answers[1:4]:
        assert answer.logits == pytest.approx(answers[0].logits, abs=1e-5)


def test_a_picture_is_turned_as_its_file_says(client, tmp_path):
    path, exif = tmp_path / "photo.png", Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    picture(0).save(path, exif=exif)
    of_file, of_picture = (client.classify(form, logits=True) for form in (path, Image.open(path)))
    assert of_picture.logits == pytest.approx(of_file.logits, abs=1e-5)


def test_options_are_the_servers_parameters(client, photo):
    answer = client.classify(photo, rate=3, model="tiny", top_k=2, compensate=False, max_rate=None)
    assert (answer.model, answer.rate, answer.compensate) == ("tiny", 3, False)
    assert len(answer.predictions) == 2
    assert answer.logits is None
    assert client.classify(photo, rate="auto", max_rate=5).asked_rate == "auto"
    within = client.classify(photo, budget=0.75, ladder="tome")
    assert (within.ladder, within.asked_budget) == ("tome", 0.75)
    assert within.macs_ratio <= 0.75


def test_several_images(client, photo):
    first, second = client.classify_many([photo, b"no image"], rate=2)
    assert isinstance(first, Classification)
    assert isinstance(second, Problem)
    assert second.status == 415
    (only,) = client.embed_many([photo], rate=2, normalize=True)
    assert isinstance(only, Embedding)
    assert only.embedding == pytest.approx(
        client.embed(photo, rate=2, normalize=True).embedding, abs=1e-5
    )


def test_what_the_server_is(client):
    assert [model.name for model in client.models()] == ["tiny", "bare"]
    assert client.model("tiny").input_size == (3, 64, 64)
    assert client.status().max_queue == 256


def test_a_refusal_has_what_the_server_said(client, photo):
    with pytest.raises(ToComServerError, match="422 Invalid parameter: the model 'tiny' runs") as e:
        client.classify(photo, rate=99)
    assert e.value.status == 422
    assert e.value.problem.instance == "/v1/classify"
    assert e.value.retry_after is None
    with pytest.raises(ToComServerError, match="no model is called 'nix'"):
        client.model("nix")


@pytest.mark.parametrize("as_list", [True, False])
def test_a_stream_of_more_images_than_one_request_holds(client, tmp_path, as_list):
    paths = [tmp_path / f"{seed}.png" for seed in range(5)]
    for seed, path in enumerate(paths):
        path.write_bytes(png(picture(seed)))
    images = [*paths[:4], b"no image", *paths[4:]]
    lines = list(client.stream_batch(images if as_list else iter(images), per_request=2, rate=3))
    assert [line.done for line in lines] == [1, 2, 3, 4, 5, 6]
    assert {line.total for line in lines} == ({6} if as_list else {None})
    by_index = {line.index: line for line in lines}
    assert sorted(by_index) == [0, 1, 2, 3, 4, 5]
    assert by_index[4].error.status == 415
    for index in (0, 1, 2, 3, 5):
        assert by_index[index].name == str(images[index])
        alone = client.classify(images[index], rate=3)
        assert by_index[index].result.predictions[0].label == alone.predictions[0].label


#: What str.splitlines takes for ends of lines, and JSON does not escape.
UNUSUAL = "a\u2028b\u2029c\x85d.png"


def test_the_name_of_a_streamed_image_may_have_unusual_characters(client, address, tmp_path):
    path = tmp_path / UNUSUAL
    path.write_bytes(png(picture(0)))

    async def use(client):
        return [line async for line in client.stream_batch([path] * 2)]

    for lines in (list(client.stream_batch([path] * 2)), run(address, use)):
        assert [line.name for line in lines] == [str(path)] * 2
        assert all(line.result for line in lines)


def test_a_stream_asks_for_images_as_it_goes(client, photo):
    asked = []

    def images():
        for index in range(100):
            asked.append(index)
            yield photo

    stream = client.stream_batch(images(), per_request=3)
    next(stream)
    assert asked == [0, 1, 2]
    stream.close()


def test_a_request_that_is_not_read_before_it_is_sent_does_not_get_stuck(client, photo):
    """Results are larger than what the sockets hold, and httpx sends before it reads."""
    lines = list(client.stream_batch([photo] * 256, per_request=256, merge_map=True, logits=True))
    assert {line.index for line in lines} == set(range(256))


@pytest.mark.parametrize("number", [0, 257])
def test_requests_that_the_server_could_not_answer_are_not_made(client, photo, number):
    with pytest.raises(ValueError, match="per_request must be in 1..256, got"):
        next(client.stream_batch([photo], per_request=number))


def test_the_asynchronous_client_does_the_same(address, photo, tmp_path):
    path = tmp_path / "photo.png"
    path.write_bytes(photo)

    async def use(client):
        answers = await asyncio.gather(*(client.classify(path, rate=rate) for rate in range(4)))
        assert [answer.rate for answer in answers] == [0, 1, 2, 3]
        (first, second) = await client.classify_many([path, b"no image"])
        assert isinstance(first, Classification)
        assert isinstance(second, Problem)
        (embedded,) = await client.embed_many([path], rate=1)
        assert embedded.embedding == pytest.approx(
            (await client.embed(path, rate=1)).embedding, abs=1e-5
        )
        lines = [line async for line in client.stream_batch([path] * 3, per_request=2)]
        assert sorted(line.index for line in lines) == [0, 1, 2]
        assert {line.name for line in lines} == {str(path)}
        assert [model.name for model in await client.models()] == ["tiny", "bare"]
        assert (await client.model("bare")).bank is None
        assert (await client.status()).ready
        with pytest.raises(ToComServerError, match="runs at the rates"):
            await client.classify(path, rate=99)

    run(address, use)


def test_both_clients_have_the_same_methods():
    def methods(kind):
        return {name: str(signature(getattr(kind, name))) for name in vars(kind) if name[0] != "_"}

    assert methods(Client).keys() == methods(AsyncClient).keys()
    for name, arguments in methods(Client).items():
        assert arguments.split(" ->")[0] == methods(AsyncClient)[name].split(" ->")[0]


class Answers:
    """Answers one after the other, or errors in their place, and what was asked."""

    def __init__(self, *answers: httpx.Response | httpx.TransportError):
        self.answers = list(answers)
        self.asked: list[httpx.Request] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        request.read()
        self.asked.append(request)
        answer = self.answers.pop(0)
        if isinstance(answer, httpx.TransportError):
            raise answer
        return answer

    async def asynchronous(self, request: httpx.Request) -> httpx.Response:
        await request.aread()
        return self(request)


FULL = {"status_code": 503, "text": "full", "headers": {"Retry-After": "7"}}
MODELS = {"status_code": 200, "json": {"models": []}}


@pytest.fixture
def naps(monkeypatch) -> list[float]:
    """The seconds that clients would have slept."""
    naps = []

    async def nap(seconds):
        naps.append(seconds)

    # Theirs alone: the server in this process sleeps too.
    monkeypatch.setattr("server.client.client.time", SimpleNamespace(sleep=naps.append))
    own = SimpleNamespace(sleep=nap, to_thread=asyncio.to_thread)
    monkeypatch.setattr("server.client.client.asyncio", own)
    return naps


@pytest.mark.parametrize("status", [503, 429])
def test_a_client_tries_again_when_the_server_says(naps, status):
    refused = FULL | {"status_code": status}
    answers = Answers(httpx.Response(**refused), httpx.Response(status), httpx.Response(**MODELS))
    client = Client(retries=2, transport=httpx.MockTransport(answers))
    assert client.models() == []
    assert naps == [7, 1]

    answers = Answers(httpx.Response(**refused), httpx.Response(**MODELS))
    transport = httpx.MockTransport(answers.asynchronous)
    assert asyncio.run(AsyncClient(retries=1, transport=transport).models()) == []
    assert naps == [7, 1, 7]


LINE = '{"index":%d,"name":null,"done":1,"total":null}\n'


@pytest.mark.parametrize("failure", [httpx.Response(**FULL), httpx.WriteError("gone")])
def test_a_stream_is_sent_whole_when_it_is_sent_again(naps, photo, failure):
    answers = Answers(failure, httpx.Response(200, text=LINE % 0 + LINE % 1))
    client = Client(retries=1, transport=httpx.MockTransport(answers))
    assert [line.index for line in client.stream_batch([photo, photo])] == [0, 1]
    first, second = answers.asked
    assert first.content == second.content
    assert first.content.count(b"\n") == 2


def broken(*last: httpx.Response) -> Answers:
    full = httpx.Response(**FULL)
    return Answers(httpx.ConnectError("refused"), full, httpx.ReadError("gone"), *last)


def test_a_client_tries_again_what_was_lost(naps):
    answers = broken(httpx.Response(**MODELS))
    assert Client(retries=3, transport=httpx.MockTransport(answers)).models() == []
    assert naps == [pytest.approx(0.125, abs=0.026), 7, pytest.approx(0.25, abs=0.051)]

    answers = broken(httpx.Response(**MODELS))
    transport = httpx.MockTransport(answers.asynchronous)
    assert asyncio.run(AsyncClient(retries=3, transport=transport).models()) == []
    assert len(naps) == 6

    client = Client(retries=2, transport=httpx.MockTransport(broken()))
    with pytest.raises(httpx.ReadError, match="gone"):
        client.models()


HEAD = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n"

#: A server that goes says so, unless it goes before it has read all that it was sent.
ENDINGS = pytest.mark.parametrize("reset", [False, True], ids=["closed", "reset"])


@ENDINGS
def test_half_an_answer_is_none(naps, reset):
    head = HEAD % 13
    answers = (b"", reset), (head + b'{"mod', reset), (head + b'{"models":[]}', False)
    with breaking(*answers) as (url, end), Client(url, retries=2) as client:
        end.set()
        assert client.models() == []
    assert len(naps) == 2


@ENDINGS
def test_a_stream_that_ends_early_is_lost_after_its_first_lines(naps, photo, reset):
    line = b'{"index":0,"name":null,"done":1,"total":null}\n'
    with breaking((HEAD % 99 + line, reset)) as (url, end), Client(url, retries=2) as client:
        stream = client.stream_batch([photo])
        assert next(stream).index == 0
        end.set()
        with pytest.raises(LOST, match="without sending complete message|reset by peer"):
            next(stream)
    assert naps == []


@contextmanager
def breaking(*answers: tuple[bytes, bool]) -> Iterator[tuple[str, threading.Event]]:
    """Listen for as many connections as there are answers; each is followed by a reset or not.

    Yields the address, and what to set before connections end.
    """
    end = threading.Event()

    def answer():
        for said, reset in answers:
            connection, _ = listener.accept()
            with connection:
                connection.recv(2**16)
                connection.sendall(said)
                end.wait(PATIENCE)
                if reset:
                    linger = struct.pack("ii", 1, 0)
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                else:
                    connection.shutdown(socket.SHUT_WR)
                    # What it leaves unread would make it a reset, too.
                    while connection.recv(2**16):
                        pass

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=answer)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", end
        thread.join()


@pytest.mark.parametrize(("retries", "refusals"), [(0, 1), (2, 3)])
def test_a_client_gives_up(naps, retries, refusals):
    answers = Answers(*(httpx.Response(**FULL) for _ in range(refusals)))
    client = Client(retries=retries, transport=httpx.MockTransport(answers))
    # Not the server's words: a proxy may have answered.
    with pytest.raises(ToComServerError, match="503 Service Unavailable: full") as refusal:
        client.models()
    assert refusal.value.retry_after == 7
    assert answers.answers == []
    assert len(naps) == retries


def test_only_what_may_pass_is_tried_again(naps):
    ours = {"Content-Type": "application/problem+json"}
    broken = httpx.Response(500, text="broken", headers=ours)
    answers = Answers(broken, httpx.ReadTimeout("too long"))
    client = Client(retries=3, transport=httpx.MockTransport(answers))
    with pytest.raises(ToComServerError, match="500 Internal Server Error: broken"):
        client.models()
    with pytest.raises(httpx.ReadTimeout, match="too long"):
        client.models()
    assert naps == []


def test_a_batch_that_the_server_ends_early(photo):
    problem = {
        "type": "about:blank", "title": "Unavailable", "status": 503, "detail": "it goes",
        "instance": "/v1/classify/batch", "error": "it goes", "request_id": "x",
    }  # fmt: skip
    last = {"index": None, "name": None, "done": 0, "total": None, "error": problem}
    answers = Answers(httpx.Response(200, json=last))
    client = Client(transport=httpx.MockTransport(answers))
    with pytest.raises(ToComServerError, match="503 Unavailable: it goes"):
        list(client.stream_batch([photo]))


def test_the_key_goes_along():
    answers = Answers(httpx.Response(**MODELS))
    Client(api_key="secret", transport=httpx.MockTransport(answers)).models()
    assert answers.asked[0].headers["authorization"] == "Bearer secret"


def test_a_client_needs_no_torch_and_of_the_server_only_the_schemas():
    program = "import sys, server.client; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    modules = set(done.stdout.split())
    assert not modules & {"torch", "fastapi", "tocom", "adapters"}
    ours = {name for name in modules if name.startswith("server.")}
    assert {name for name in ours if not name.startswith("server.client")} == {"server.schemas"}
