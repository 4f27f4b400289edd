"""Settings of who may ask: keys and what each allows, origins of pages, hosts of images."""

import re
from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    SecretStr,
    ValidationInfo,
    field_validator,
)


def _check_key(key: SecretStr) -> SecretStr:
    # It travels in a header, and one that can be guessed protects nothing.
    if not re.fullmatch(r"[!-~]{16,}", key.get_secret_value()):
        raise ValueError("a key must be 16 or more printable ASCII characters without spaces")
    return key


Key = Annotated[SecretStr, AfterValidator(_check_key)]


def _check_origin(origin: str) -> str:
    # Browsers send it just so; with a path or a last slash it would never match.
    if origin != "*" and not re.fullmatch(r"https?://[^\s/?#@*]+", origin):
        raise ValueError("an origin is scheme://host or scheme://host:port, without a path, or *")
    return origin


Origin = Annotated[str, AfterValidator(_check_origin)]


def _check_fetch_host(host: str) -> str:
    if not re.fullmatch(r"(\*\.)?[a-z0-9]([a-z0-9.-]*[a-z0-9])?(:\d{1,5})?", host):
        raise ValueError(
            "a host is a name in lower case as images.example.org, *.example.org or "
            "images.example.org:8443"
        )
    return host


FetchHost = Annotated[str, AfterValidator(_check_fetch_host)]


class ApiKey(BaseModel):
    """A key for inference and what it allows."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$", description="whose it is, for messages"
    )
    key: Key = Field(description="the secret: 16 or more printable characters")
    rate_limit: float | None = Field(
        default=None, gt=0, description="images a second on average; default: no limit"
    )
    burst: int | None = Field(
        default=None, ge=1, description="images at once; default: those of one second"
    )
    priority: Literal["high", "normal", "low"] = Field(
        default="normal",
        description="whose images go first; lower ones keep `priority_share` of the time",
    )

    @field_validator("burst")
    @classmethod
    def _of_a_limit(cls, burst: int | None, info: ValidationInfo) -> int | None:
        if burst is not None and info.data.get("rate_limit") is None:
            raise ValueError("a burst needs a rate_limit")
        return burst
