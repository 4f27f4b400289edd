"""Fetching images that a request names by their address.

It is the server that asks for them, so nobody may make it ask where they could not ask themselves:
only hosts that the settings name are fetched from, never an address that is not public, and a name
is resolved once: what was checked is what is connected to. Redirects are checked alike.
"""

import asyncio
import ipaddress
import re
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Annotated

import httpx
from anyio import fail_after
from fastapi import Depends

from server.errors import DeadlineError, FetchError, ForbiddenError, TooLargeError
from server.settings import Settings
from server.web.middleware import Budget
from server.web.serving import held

#: What the address of an image begins with.
URL = re.compile(r"https?://", re.IGNORECASE)

#: Redirects that are followed for one image.
MAX_REDIRECTS = 3

#: Images that are fetched at once for one request.
AT_ONCE = 8

DEFAULT_PORTS = {"http": 80, "https": 443}

#: Returns the addresses of a host, for a port.
Resolve = Callable[[str, int], Awaitable[Sequence[str]]]


async def resolved(host: str, port: int) -> list[str]:
    """Return the addresses of a host as the system knows them.

    Raises:
        OSError: if it knows none.
    """
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(address[0]) for *_, address in found]


def is_public(address: str) -> bool:
    """Tell whether an IP address is one of the public internet, and of nothing within a network."""
    ip = ipaddress.ip_address(address)
    if isinstance(ip, ipaddress.IPv6Address) and (ip.sixtofour or ip.teredo or ip.is_site_local):
        return False  # an IPv4 address in disguise, which may be any, or one of old networks
    return ip.is_global and not ip.is_multicast and not ip.is_reserved


class Fetcher:
    """See the module. One for each server; not for several threads."""

    def __init__(
        self,
        settings: Settings,
        budget: Budget,
        transport: httpx.AsyncBaseTransport | None = None,
        resolve: Resolve = resolved,
    ) -> None:
        """Connect to nothing yet.

        Args:
            settings: name the hosts and the limits.
            budget: holds the bytes of what is fetched.
            transport: sends requests; default: over the network.
            resolve: returns the addresses of a host.
        """
        self._hosts = settings.fetch_hosts
        self._timeout = settings.fetch_timeout_ms / 1000
        self._max_bytes = settings.max_body_bytes
        self._budget = budget
        self._transport = transport
        self._resolve = resolve

    @asynccontextmanager
    async def files(
        self, images: Sequence[bytes | str], seconds: float
    ) -> AsyncIterator[list[bytes]]:
        """Fetch what is still an address; the bytes are counted as held until the end.

        Args:
            images: files, or addresses of files.
            seconds: until they are of no more use.

        Raises:
            ForbiddenError: if an address is not allowed; nothing is fetched then.
            DeadlineError: if they are of no more use.
            FetchError: if one cannot be fetched.
            TooLargeError: if all of them together are larger than a body may be.
            UnavailableError: if the server holds too many bytes already.
        """
        for image in images:
            if isinstance(image, str):
                self._check(_parsed(image))
        room = _Room(self._budget, self._max_bytes)
        try:
            yield await self._fetch_all(images, room, seconds)
        finally:
            room.leave()

    async def close(self) -> None:
        """Close what is open."""
        if self._transport:
            await self._transport.aclose()

    async def _fetch_all(
        self, images: Sequence[bytes | str], room: "_Room", seconds: float
    ) -> list[bytes]:
        gate = asyncio.Semaphore(AT_ONCE)

        async def file(image: bytes | str) -> bytes:
            if isinstance(image, bytes):
                return image
            async with gate:
                return await self._fetch(image, room)

        try:
            with fail_after(seconds):
                got = await asyncio.gather(*map(file, images), return_exceptions=True)
        except TimeoutError:
            raise DeadlineError("the deadline passed before the images were fetched") from None
        if failures := [each for each in got if isinstance(each, BaseException)]:
            raise failures[0]
        return [each for each in got if isinstance(each, bytes)]

    async def _fetch(self, address: str, room: "_Room") -> bytes:
        shown = _shown(address)
        try:
            with fail_after(self._timeout):
                return await self._follow(_parsed(address), room)
        except TimeoutError:
            raise FetchError(
                f"{shown} was not fetched within {1000 * self._timeout:g} ms"
            ) from None
        # A host of labels that no name has is a UnicodeError to whoever looks it up.
        except (httpx.HTTPError, httpx.InvalidURL, OSError, UnicodeError) as error:
            # What the network says of hosts is no business of strangers.
            kind = type(error).__name__
            raise FetchError(f"{shown} cannot be fetched ({kind})") from error

    async def _follow(self, url: httpx.URL, room: "_Room") -> bytes:
        for _ in range(1 + MAX_REDIRECTS):
            self._check(url)
            response = await self._send(url)
            try:
                if response.has_redirect_location:
                    url = url.join(response.headers["Location"])
                    continue
                if response.status_code != httpx.codes.OK:
                    raise FetchError(f"{_shown(url)} answers {response.status_code}, not 200")
                body = bytearray()
                async for chunk in response.aiter_raw():
                    room.take(len(chunk))
                    body += chunk
                return bytes(body)
            finally:
                await response.aclose()
        raise FetchError(
            f"{_shown(url)} is one redirect more than the {MAX_REDIRECTS} that are followed"
        )

    def _check(self, url: httpx.URL) -> None:
        """Raise ForbiddenError unless the settings allow the host and port of an address."""
        if not self._hosts:
            raise ForbiddenError(
                "this server fetches no images: send them as data: URIs, or let the setting "
                "`fetch_hosts` name the host"
            )
        host = url.raw_host.decode("ascii").lower()
        usual = url.port in (None, DEFAULT_PORTS.get(url.scheme))
        name = host if usual else f"{host}:{url.port}"
        if url.scheme not in DEFAULT_PORTS or url.userinfo or not _allowed(name, self._hosts):
            raise ForbiddenError(
                f"images are not fetched from {_shown(url)!r}: only by http or https, without a "
                f"user, and from {', '.join(self._hosts)}"
            )

    async def _send(self, url: httpx.URL) -> httpx.Response:
        """Ask for an address at an IP address that was checked."""
        host = url.raw_host.decode("ascii")
        addresses = await self._resolve(host.strip("[]"), url.port or DEFAULT_PORTS[url.scheme])
        # One that is not public among others is no accident.
        if not addresses or not all(map(is_public, addresses)):
            raise ForbiddenError(f"images are not fetched from {host}: its address is not public")
        request = httpx.Request(
            "GET",
            url.copy_with(host=addresses[0]),
            headers={"Host": url.netloc.decode("ascii"), "Accept-Encoding": "identity"},
            extensions={"sni_hostname": host},  # of the certificate that is asked for and checked
        )
        if self._transport is None:
            # The transport alone: a client would keep cookies, and read the environment's proxies.
            # No connection is used twice: it would be found by its IP address, whatever its host.
            limits = httpx.Limits(max_keepalive_connections=0)
            self._transport = httpx.AsyncHTTPTransport(limits=limits, trust_env=False)
        return await self._transport.handle_async_request(request)


class _Room:
    """The bytes that are held for one request."""

    def __init__(self, budget: Budget, limit: int) -> None:
        self._budget = budget
        self._limit = limit
        self._held = 0

    def take(self, size: int) -> None:
        if self._held + size > self._limit:
            raise TooLargeError(
                f"what is fetched for a request is larger than the {self._limit:,} bytes that are "
                "allowed"
            )
        self._budget.take(size)
        self._held += size

    def leave(self) -> None:
        self._budget.release(self._held)


def _shown(address: httpx.URL | str) -> str:
    return str(address)[:100]


def _parsed(address: str) -> httpx.URL:
    try:
        return httpx.URL(address)
    except httpx.InvalidURL as error:
        raise FetchError(f"{_shown(address)!r} is not an address: {error}") from error


def _allowed(name: str, hosts: Sequence[str]) -> bool:
    """Tell whether a host, with its port if that is not the usual one, is one of the settings'."""
    return any(
        name.endswith(host.removeprefix("*")) if host.startswith("*.") else name == host
        for host in hosts
    )


FetcherDep = Annotated[Fetcher, Depends(held("fetcher", Fetcher))]
