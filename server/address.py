"""Where a server listens. Needs nothing that takes long to import."""

import errno
import logging
import os
import socket
from contextlib import ExitStack, suppress
from typing import Any

from tocom import ConfigError

_log = logging.getLogger(__name__)
_FULL = b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 2\r\nContent-Length: 0\r\n\r\n"


class Listener(socket.socket):
    """A listening socket with a file descriptor in reserve.

    When the process has no other left, a connection is taken with this one, told 503 and closed.
    It would wait for as long as that lasts, and asyncio, which goes on trying, log it thousands of
    times. uvloop has a reserve of its own.
    """

    def __init__(self, *arguments: Any) -> None:
        """Take the arguments of a socket."""
        super().__init__(*arguments)
        self._reserve: int | None = None
        self._renew_reserve()

    def accept(self) -> tuple[socket.socket, Any]:
        """Return the next connection and its address.

        Raises:
            BlockingIOError: if there is none, or it had to be refused.
        """
        self._renew_reserve()
        try:
            return super().accept()
        except OSError as error:
            if error.errno not in (errno.EMFILE, errno.ENFILE) or self._reserve is None:
                raise
            _log.warning("connections are refused: %s", error.strerror)
            self._refuse()
            raise BlockingIOError from error

    def close(self) -> None:
        """Close it, and its reserve."""
        super().close()
        self._give_up_reserve()

    def _refuse(self) -> None:
        self._give_up_reserve()
        connection, _ = super().accept()
        with connection, suppress(OSError):  # its client has gone
            connection.setblocking(False)
            connection.send(_FULL)

    def _renew_reserve(self) -> None:
        if self._reserve is None:
            with suppress(OSError):  # another thread took the last one
                self._reserve = os.open(os.devnull, os.O_RDONLY)

    def _give_up_reserve(self) -> None:
        if self._reserve is not None:
            os.close(self._reserve)
            self._reserve = None


def bind(host: str, port: int) -> Listener:
    """Return a socket at an address; it does not listen yet.

    Raises:
        ConfigError: if it cannot be had.
    """
    with ExitStack() as on_error:
        try:
            family, kind, protocol, _, address = socket.getaddrinfo(
                host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )[0]
            listener = on_error.enter_context(Listener(family, kind, protocol))
            # A port that a former server has just left may be taken at once.
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
        except (OSError, UnicodeError) as error:  # the latter of a host that is no name
            reason = error.strerror if isinstance(error, OSError) else error
            raise ConfigError(f"cannot listen on {host}, port {port}: {reason}") from error
        on_error.pop_all()
        return listener


def url(listener: socket.socket) -> str:
    """Return the address of a socket as clients write it."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
