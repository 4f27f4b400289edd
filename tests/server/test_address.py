"""Where a server listens, and what becomes of connections when file descriptors run out."""

import asyncio
import os
import resource
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from server import address

SERVED = b"HTTP/1.1 204 No Content\r\n\r\n"


def descriptors() -> list[int]:
    return [int(each.name) for each in Path("/proc/self/fd").iterdir()]


@contextmanager
def no_descriptors() -> Iterator[None]:
    """Leave this process no file descriptor to open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with ExitStack() as stack:
        highest = max(descriptors())
        stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 1, hard))
        try:
            while True:
                stack.callback(os.close, os.open(os.devnull, os.O_RDONLY))
        except OSError:
            yield


async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(SERVED)
    writer.close()


def test_without_descriptors_connections_are_refused_and_later_served(caplog):
    async def run() -> list[bytes]:
        loop, answers = asyncio.get_running_loop(), []
        with address.bind("127.0.0.1", 0) as listener, ExitStack() as stack:
            where = listener.getsockname()
            clients = [stack.enter_context(socket.socket()) for _ in range(4)]
            async with await asyncio.start_server(serve, sock=listener):
                for client in clients:
                    client.setblocking(False)
                with no_descriptors():
                    for client in clients[:3]:
                        await loop.sock_connect(client, where)
                        answers.append(await loop.sock_recv(client, 1000))
                await loop.sock_connect(clients[3], where)
                answers.append(await loop.sock_recv(clients[3], 1000))
        return answers

    *refused, served = asyncio.run(run())
    assert len(refused) == 3
    assert all(each.startswith(b"HTTP/1.1 503 ") for each in refused)
    assert served == SERVED
    # Where the server's own log is set up, what repeats itself is said once.
    said = {record.getMessage() for record in caplog.records}
    assert said == {"connections are refused: Too many open files"}


def test_a_closed_listener_gives_its_reserve_back():
    before = descriptors()
    address.bind("127.0.0.1", 0).close()
    assert descriptors() == before
