"""Fetching: only from hosts that are named, never within a network, whatever names say."""

import asyncio
import base64
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
import pytest
from fastapi.testclient import TestClient

from server.app import create_app
from server.errors import FetchError, ForbiddenError, TooLargeError, UnavailableError
from server.settings import Settings, load_settings
from server.web.fetching import Fetcher, is_public
from server.web.middleware import Budget
from tocom import ConfigError

PUBLIC = "93.184.216.34"
HOSTS = ("images.example.org", "*.example.net", "odd.example.org:8443")


class Content(httpx.AsyncByteStream):
    """A body that arrives in pieces."""

    def __init__(self, content: bytes) -> None:
        self.content = content

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for at in range(0, len(self.content), 50):
            yield self.content[at : at + 50]


class Network:
    """Hosts by their names, and what they answer; notes what was asked of whom."""

    def __init__(
        self, answers: dict[str, bytes | httpx.Response], names: dict[str, list[str]]
    ) -> None:
        self.answers = answers
        self.names = names
        self.asked: list[tuple[str, str, str]] = []
        self.resolved: list[tuple[str, int]] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.asked.append(
            (request.url.host, request.headers["Host"], request.extensions["sni_hostname"])
        )
        path = request.url.raw_path.decode()
        answer = self.answers[f"{request.url.scheme}://{request.headers['Host']}{path}"]
        return httpx.Response(200, stream=Content(answer)) if isinstance(answer, bytes) else answer

    async def resolve(self, host: str, port: int) -> list[str]:
        self.resolved.append((host, port))
        if host not in self.names:
            raise OSError(f"{host} is not known")
        return self.names[host]


def fetch(*images, answers=None, names=None, budget=None, **settings):
    """Fetch images; returns the files, and the network that was asked."""
    network = Network(answers or {}, {"images.example.org": [PUBLIC], **(names or {})})
    allowed = Settings(**{"fetch_hosts": HOSTS, **settings})
    budget = budget or Budget(2**30)
    fetcher = Fetcher(allowed, budget, httpx.MockTransport(network), network.resolve)

    async def run() -> list[bytes]:
        async with fetcher.files(images, seconds=60) as files:
            return files

    try:
        return asyncio.run(run()), network
    finally:
        assert budget.held == 0


def test_files_are_fetched_from_the_address_that_was_checked():
    files, network = fetch(
        "https://images.example.org/a.png?x=1",
        b"a file",
        answers={"https://images.example.org/a.png?x=1": b"fetched"},
    )
    assert files == [b"fetched", b"a file"]
    # Resolved once; asked for by name of whoever has the address.
    assert network.resolved == [("images.example.org", 443)]
    assert network.asked == [(PUBLIC, "images.example.org", "images.example.org")]


@pytest.mark.parametrize(
    "address",
    ["http://a.b.example.net/x", "http://a.example.net/x", "https://odd.example.org:8443/x"],
)
def test_hosts_that_the_settings_name(address):
    names = {"a.b.example.net": [PUBLIC], "a.example.net": [PUBLIC], "odd.example.org": [PUBLIC]}
    files, _ = fetch(address, answers={address: b"x"}, names=names)
    assert files == [b"x"]


@pytest.mark.parametrize(
    "address",
    [
        "http://example.org/x",
        "http://example.net/x",
        "http://notexample.net/x",
        "http://images.example.org.evil.com/x",
        "http://images.example.org@evil.com/x",
        "http://user:secret@images.example.org/x",
        "http://evil.com#@images.example.org/x",
        "http://evil.com\\@images.example.org/x",
        "http://images.example.org:22/x",
        "http://images.example.org:99999/x",
        "http://odd.example.org/x",
        "http://127.0.0.1/x",
        "http://2130706433/x",
        "http://0x7f.1/x",
        "http://[::1]/x",
        "http://[::ffff:169.254.169.254]/x",
        "http://169.254.169.254/latest/meta-data",
        "http://localhost/x",
    ],
)
def test_no_other_host_is_asked(address):
    names = {"evil.com": [PUBLIC], "localhost": ["127.0.0.1"]}
    with pytest.raises((ForbiddenError, FetchError), match="not fetched from|not an address"):
        fetch(address, names=names)


@pytest.mark.parametrize(
    "addresses",
    [
        ["127.0.0.1"],
        ["10.1.2.3"],
        ["172.16.0.1"],
        ["192.168.0.1"],
        ["169.254.169.254"],
        ["100.64.0.1"],
        ["0.0.0.0"],
        ["224.0.0.1"],
        ["255.255.255.255"],
        ["::1"],
        ["fe80::1"],
        ["fe80::1%eth0"],
        ["fd00::1"],
        ["fec0::1"],
        ["ff02::1"],
        ["::ffff:127.0.0.1"],
        ["::127.0.0.1"],
        ["64:ff9b::7f00:1"],
        ["2002:7f00:1::"],
        ["2001:0:7f00:1::"],
        [PUBLIC, "10.0.0.1"],
        [],
    ],
)
def test_names_that_stand_for_something_within_a_network_are_refused(addresses):
    with pytest.raises(ForbiddenError, match="its address is not public"):
        fetch("http://images.example.org/x", names={"images.example.org": addresses})


@pytest.mark.parametrize("host", ["a..example.net", f"{64 * 'a'}.example.net"])
def test_names_that_no_host_can_have(host):
    fetcher = Fetcher(Settings(fetch_hosts=HOSTS), Budget(2**30))  # asks the system

    async def run() -> None:
        async with fetcher.files([f"http://{host}/x"], seconds=60):
            pass

    with pytest.raises(FetchError, match="cannot be fetched"):
        asyncio.run(run())


@pytest.mark.parametrize("address", [PUBLIC, "8.8.8.8", "2606:2800:220:1:248:1893:25c8:1946"])
def test_public_addresses(address):
    assert is_public(address)


def test_redirects_are_followed_where_they_are_allowed():
    files, network = fetch(
        "http://images.example.org/a",
        answers={
            "http://images.example.org/a": httpx.Response(302, headers={"Location": "/b"}),
            "http://images.example.org/b": httpx.Response(
                301, headers={"Location": "https://cdn.example.net/c"}
            ),
            "https://cdn.example.net/c": b"moved",
        },
        names={"cdn.example.net": ["8.8.8.8"]},
    )
    assert files == [b"moved"]
    assert [host for host, *_ in network.asked] == [PUBLIC, PUBLIC, "8.8.8.8"]


@pytest.mark.parametrize(
    "location",
    [
        "http://169.254.169.254/latest/meta-data",
        "http://localhost/x",
        "http://evil.com/x",
        "file:///etc/passwd",
        "ftp://images.example.org/x",
        "//evil.com/x",
        "http://inside.example.net/x",
    ],
)
def test_redirects_are_checked_as_the_first_address_was(location):
    with pytest.raises(ForbiddenError, match="not fetched from"):
        fetch(
            "http://images.example.org/a",
            answers={
                "http://images.example.org/a": httpx.Response(302, headers={"Location": location})
            },
            names={"inside.example.net": ["10.0.0.1"], "evil.com": [PUBLIC]},
        )


def test_a_name_that_changes_its_address_is_checked_again_for_a_redirect():
    again = httpx.Response(302, headers={"Location": "/a"})
    addresses = [[PUBLIC], ["127.0.0.1"]]
    network = Network({"http://images.example.org/a": again}, {})

    async def resolve(host: str, port: int) -> list[str]:
        return addresses.pop(0)

    fetcher = Fetcher(
        Settings(fetch_hosts=HOSTS), Budget(2**30), httpx.MockTransport(network), resolve
    )

    async def run() -> None:
        async with fetcher.files(["http://images.example.org/a"], seconds=60):
            pass

    with pytest.raises(ForbiddenError, match="its address is not public"):
        asyncio.run(run())
    assert [host for host, *_ in network.asked] == [PUBLIC]


def test_redirects_come_to_an_end():
    again = httpx.Response(302, headers={"Location": "/a"})
    with pytest.raises(FetchError, match="one redirect more than the 3 that are followed"):
        fetch("http://images.example.org/a", answers={"http://images.example.org/a": again})


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("http://images.example.org/nix", "answers 404, not 200"),
        ("http://gone.example.net/x", r"gone.example.net/x cannot be fetched \(OSError\)"),
        ("http://images.example.org:port/x", "is not an address"),
    ],
)
def test_what_cannot_be_fetched(address, message):
    with pytest.raises(FetchError, match=message):
        fetch(address, answers={"http://images.example.org/nix": httpx.Response(404)})


def test_all_of_a_request_together_may_be_as_large_as_a_body():
    answers = {f"http://images.example.org/{name}": bytes(60) for name in "ab"}
    limits = {"answers": answers, "max_body_bytes": 100}
    assert len(fetch("http://images.example.org/a", **limits)[0][0]) == 60
    with pytest.raises(TooLargeError, match="larger than the 100 bytes"):
        fetch(*answers, **limits)
    with pytest.raises(UnavailableError, match="hold 50 of the 50 bytes"):
        fetch("http://images.example.org/a", budget=Budget(50), **limits)


def test_a_host_that_does_not_answer_is_given_up():
    async def hang(request: httpx.Request) -> httpx.Response:
        await asyncio.Event().wait()
        raise AssertionError

    async def resolve(host: str, port: int) -> list[str]:
        return [PUBLIC]

    settings = Settings(fetch_hosts=HOSTS, fetch_timeout_ms=1)
    fetcher = Fetcher(settings, Budget(2**30), httpx.MockTransport(hang), resolve)

    async def run() -> None:
        async with fetcher.files(["http://images.example.org/a"], seconds=60):
            pass

    with pytest.raises(FetchError, match="was not fetched within 1 ms"):
        asyncio.run(run())


def test_by_default_nothing_is_fetched():
    with pytest.raises(ForbiddenError, match="fetches no images: .*`fetch_hosts` name the host"):
        fetch("http://images.example.org/a", fetch_hosts=())


@pytest.mark.parametrize("host", ["http://example.org", "example.org/x", "*", "*.", "A.org", "a b"])
def test_hosts_that_are_none(host):
    with pytest.raises(ConfigError, match=r"setting fetch_hosts\.0: a host is a name"):
        load_settings(fetch_hosts=[host])


@asynccontextmanager
async def one_file(content: bytes):
    """A real server that answers everything with a file; yields its port."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        head = f"HTTP/1.1 200 OK\r\nContent-Length: {len(content)}\r\n\r\n"
        writer.write(head.encode() + content)
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1]


def test_over_a_real_connection(monkeypatch):
    async def resolve(host: str, port: int) -> list[str]:
        return ["127.0.0.1"]

    async def run() -> list[bytes]:
        async with one_file(b"over there") as port:
            settings = Settings(fetch_hosts=(f"images.example.org:{port}",))
            fetcher = Fetcher(settings, Budget(2**30), resolve=resolve)
            async with fetcher.files([f"http://images.example.org:{port}/x"], seconds=60) as files:
                await fetcher.close()
                return files

    with pytest.raises(ForbiddenError, match="not public"):
        asyncio.run(run())
    monkeypatch.setattr("server.web.fetching.is_public", lambda address: True)
    assert asyncio.run(run()) == [b"over there"]


def test_routes_that_fetch(settings, photo):
    app = create_app(
        settings.model_copy(update={"fetch_hosts": ("images.example.org",), "warmup": "none"})
    )
    address = "http://images.example.org/a.png"
    network = Network({address: photo}, {"images.example.org": [PUBLIC]})
    b64 = base64.b64encode(photo).decode()
    with TestClient(app) as client:
        app.state.fetcher = Fetcher(
            app.state.serving.settings,
            app.state.serving.budget,
            httpx.MockTransport(network),
            network.resolve,
        )
        body = {"input": [address, f"data:image/png;base64,{b64}"], "modality": "image"}
        first, second = client.post("/v1/embeddings", json=body).json()["data"]
        assert first["embedding"] == pytest.approx(second["embedding"], abs=1e-5)
        fetched = client.post("/models/tiny", json={"inputs": address}).json()
        assert fetched == client.post("/models/tiny", json={"inputs": b64}).json()
        refused = client.post("/v1/embeddings", json={"input": "http://169.254.169.254/x"})
        assert refused.status_code == 403
        assert refused.json()["error"]["code"] == "forbidden"
        assert len(network.asked) == 2
        assert app.state.serving.budget.held == 0
