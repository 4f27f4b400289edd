"""Errors of the server, each with the HTTP status that it is answered with.

They extend the one tree of `tocom.errors`; a message says what came and what is allowed and
may be shown as it is. How an error becomes an answer is in `problems`.
"""

import math
from collections.abc import Mapping
from typing import ClassVar

from tocom import TocomError


class ServerError(TocomError):
    """Base of what a request can fail with.

    Attributes:
        status: HTTP status.
        title: short name of the kind of error; the same for all of its kind.
        headers: of the answer.
    """

    status: ClassVar[int] = 400
    title: ClassVar[str] = "Bad request"
    headers: Mapping[str, str] = {}


class BadRequestError(ServerError):
    """A request that cannot be parsed."""


class UnauthorizedError(ServerError):
    """A request without a key, or with one that does not open this."""

    status = 401
    title = "Unauthorized"
    headers: Mapping[str, str] = {"WWW-Authenticate": "Bearer"}


class ForbiddenError(ServerError):
    """What this server lets nobody do."""

    status = 403
    title = "Forbidden"


class UnknownModelError(ServerError):
    """A model that is not served here."""

    status = 404
    title = "Unknown model"


class UnknownLadderError(ServerError):
    """A ladder that the model is not served on."""

    status = 404
    title = "Unknown ladder"


class UnknownBankError(ServerError):
    """A bank that cannot be had here."""

    status = 404
    title = "Unknown bank"


class UploadTimeoutError(ServerError):
    """A body that did not arrive in time."""

    status = 408
    title = "Upload too slow"


class ConflictError(ServerError):
    """What cannot be done in the state that things are in."""

    status = 409
    title = "Conflict"


class TooLargeError(ServerError):
    """Too many bytes or images, or an image of too many pixels."""

    status = 413
    title = "Too large"


class UnsupportedTypeError(ServerError):
    """A body, or an image format, that is not read here."""

    status = 415
    title = "Unsupported type"


class ParameterError(ServerError):
    """A parameter whose value is not allowed."""

    status = 422
    title = "Invalid parameter"


class ShortDeadlineError(ServerError):
    """A deadline that even an idle server could not keep.

    422, not 504 or 503: nothing was tried, and the same request would be refused again. Clients
    and proxies repeat what fails with a 5xx, and operators are woken by it.
    """

    status = 422
    title = "Deadline too short"


class ImageError(ServerError):
    """An image of a known format that cannot be decoded or used."""

    status = 422
    title = "Unusable image"


class FetchError(ServerError):
    """An image that a request names by its address and that cannot be had there."""

    status = 422
    title = "Unfetched image"


class UnusableBankError(ServerError):
    """A bank that is faulty or does not fit the model."""

    status = 422
    title = "Unusable bank"


class QuotaError(ServerError):
    """A caller that asks for more than its key allows.

    Args:
        retry_after: seconds after which it may ask again.
    """

    status = 429
    title = "Quota exceeded"

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.headers = {"Retry-After": str(max(1, math.ceil(retry_after)))}


class UnavailableError(ServerError):
    """No request can be taken now; it is not the client's fault.

    Attributes:
        retry_after: seconds after which trying again makes sense.
    """

    status = 503
    title = "Unavailable"

    def __init__(self, message: str, retry_after: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class QueueFullError(UnavailableError):
    """As many images as may wait are waiting."""

    title = "Queue full"


class DeadlineError(ServerError):
    """A request that was taken and not answered within its deadline."""

    status = 504
    title = "Deadline passed"


class StoreFaultError(ServerError):
    """A store of banks that cannot be written."""

    status = 507
    title = "Store unusable"
