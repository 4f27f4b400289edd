"""Errors of the server, each with the HTTP status that it is answered with.

They extend the one tree of `tocom.errors`; a message says what came and what is allowed and
may be shown as it is. How an error becomes an answer is in `problems`.
"""

from typing import ClassVar

from tocom import TocomError


class ServerError(TocomError):
    """Base of what a request can fail with.

    Attributes:
        status: HTTP status.
        title: short name of the kind of error; the same for all of its kind.
    """

    status: ClassVar[int] = 400
    title: ClassVar[str] = "Bad request"


class BadRequestError(ServerError):
    """A request that cannot be parsed."""


class UnknownModelError(ServerError):
    """A model that is not served here."""

    status = 404
    title = "Unknown model"


class UploadTimeoutError(ServerError):
    """A body that did not arrive in time."""

    status = 408
    title = "Upload too slow"


class TooLargeError(ServerError):
    """Too many bytes, or an image of too many pixels."""

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


class ImageError(ServerError):
    """An image of a known format that cannot be decoded or used."""

    status = 422
    title = "Unusable image"


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
