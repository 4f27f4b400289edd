"""Who may do what: the admin key for banks, API keys for inference and how much they allow.

Keys are compared in constant time and appear in no message and no log. Quotas are counted by
this process alone: several of them behind one address allow several times as much.
"""

import asyncio
import hmac
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Request
from fastapi.security import APIKeyHeader, HTTPAuthorizationCredentials, HTTPBearer
from pydantic import SecretStr

from server.engine.turns import NORMAL, PRIORITIES
from server.errors import ForbiddenError, QuotaError, UnauthorizedError
from server.settings import Settings
from server.web.serving import held

_HOW = "send one as `Authorization: Bearer KEY` or `X-API-Key: KEY`"


class Bucket:
    """A token bucket of images. Not for several threads: the event loop owns it.

    It may be overdrawn: how many images a request holds is known only after it was let in.
    Those who come next wait until that is made up for, so the average holds.
    """

    def __init__(self, rate: float, burst: float, clock: Callable[[], float]) -> None:
        """Begin full.

        Args:
            rate: images that it gains a second.
            burst: images that it holds, at least one.
            clock: tells seconds.
        """
        self.rate = rate
        self.burst = burst
        self._clock = clock
        self._level = burst
        self._at = clock()

    def wait(self) -> float:
        """Return the seconds until there is an image to take; 0: there is one."""
        return max(0.0, (1 - self._refilled()) / self.rate)

    def take(self, images: int) -> None:
        """Take some images, whether they are there or not."""
        self._level = self._refilled() - images

    def _refilled(self) -> float:
        now = self._clock()
        self._level = min(self.burst, self._level + (now - self._at) * self.rate)
        self._at = now
        return self._level


@dataclass(frozen=True)
class Caller:
    """Whose key a request came with; no bucket: it may ask for any number of images."""

    name: str
    bucket: Bucket | None
    priority: int


class Access:
    """The keys of a server."""

    def __init__(self, settings: Settings, clock: Callable[[], float] = time.monotonic) -> None:
        self._admin = settings.admin_key
        self._callers: list[tuple[SecretStr, Caller]] = []
        for each in settings.api_keys:
            bucket = None
            if each.rate_limit is not None:
                bucket = Bucket(each.rate_limit, each.burst or max(1, each.rate_limit), clock)
            caller = Caller(each.name, bucket, PRIORITIES.index(each.priority))
            self._callers.append((each.key, caller))

    def check_admin(self, key: str | None) -> None:
        """Let the admin key pass, and nothing else.

        Raises:
            ForbiddenError: if there is no admin key.
            UnauthorizedError: if this is not it.
        """
        if self._admin is None:
            raise ForbiddenError(
                "banks cannot be changed over HTTP until the setting `admin_key` is set"
            )
        if key is None:
            raise UnauthorizedError(f"this needs the admin key: {_HOW}")
        if not _same(key, self._admin):
            raise UnauthorizedError("this needs the admin key, and the key that came is not it")

    def admit(self, key: str | None) -> Caller | None:
        """Let a request for inference pass and take one image from its quota.

        Returns:
            Whose key it is; None if the server is open to all.

        Raises:
            UnauthorizedError: if a key is needed and this is none.
            QuotaError: if its quota is used up.
        """
        caller = self.identify(key)
        if caller and (bucket := caller.bucket):
            if wait := bucket.wait():
                raise QuotaError(
                    f"the key {caller.name!r} allows {bucket.rate:g} images a second, "
                    f"{math.floor(bucket.burst)} at once; the next one in {wait:.1f} s",
                    wait,
                )
            bucket.take(1)
        return caller

    def identify(self, key: str | None) -> Caller | None:
        """Return whose key it is; None if the server is open to all.

        Raises:
            UnauthorizedError: if a key is needed and this is none.
        """
        if not self._callers:
            return None
        if key is None:
            raise UnauthorizedError(f"inference needs an API key: {_HOW}")
        caller = next((caller for secret, caller in self._callers if _same(key, secret)), None)
        if caller is None:
            raise UnauthorizedError("the API key that came is not known here")
        return caller


AccessDep = Annotated[Access, Depends(held("access", Access))]


async def _key(
    bearer: Annotated[HTTPAuthorizationCredentials | None, Depends(HTTPBearer(auto_error=False))],
    header: Annotated[str | None, Depends(APIKeyHeader(name="X-API-Key", auto_error=False))],
) -> str | None:
    return bearer.credentials if bearer else header


GivenKey = Annotated[str | None, Depends(_key)]


async def require_admin(access: AccessDep, key: GivenKey) -> None:
    """Let only requests with the admin key pass (see `Access.check_admin`)."""
    access.check_admin(key)


async def require_api_key(request: Request, access: AccessDep, key: GivenKey) -> None:
    """Let only requests with an API key pass, if there are any (see `Access.admit`)."""
    request.state.caller = access.admit(key)


async def require_known_key(access: AccessDep, key: GivenKey) -> None:
    """Let only requests with an API key pass, if there are any, and charge them nothing."""
    access.identify(key)


def caller_of(request: Request) -> Caller | None:
    """Return whose key a request came with; None if the server is open to all."""
    caller: Caller | None = getattr(request.state, "caller", None)
    return caller


def priority_of(request: Request) -> int:
    """Return the priority of a request's images."""
    caller = caller_of(request)
    return NORMAL if caller is None else caller.priority


def charge(request: Request, images: int) -> None:
    """Take what a request holds beyond its first image from its quota; never refuses."""
    caller = caller_of(request)
    if caller and caller.bucket:
        caller.bucket.take(images)


async def charge_when_allowed(request: Request) -> None:
    """Wait until a request's quota has another image, and take it."""
    caller = caller_of(request)
    if caller and caller.bucket:
        while wait := caller.bucket.wait():
            await asyncio.sleep(wait)
        caller.bucket.take(1)


def _same(key: str, secret: SecretStr) -> bool:
    # Headers arrive as Latin-1, whatever bytes they were; keys are ASCII.
    return hmac.compare_digest(key.encode("latin-1"), secret.get_secret_value().encode())
