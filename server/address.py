"""Where a server listens. Needs nothing that takes long to import."""

import socket
from contextlib import ExitStack

from tocom import ConfigError


def bind(host: str, port: int) -> socket.socket:
    """Return a socket at an address; it does not listen yet.

    Raises:
        ConfigError: if it cannot be had.
    """
    with ExitStack() as on_error:
        try:
            family, kind, protocol, _, address = socket.getaddrinfo(
                host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )[0]
            listener = on_error.enter_context(socket.socket(family, kind, protocol))
            # A port that a former server has just left may be taken at once.
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
        except OSError as error:
            raise ConfigError(f"cannot listen on {host}, port {port}: {error.strerror}") from error
        on_error.pop_all()
        return listener


def url(listener: socket.socket) -> str:
    """Return the address of a socket as clients write it."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
