"""Servers to measure: processes of their own on free ports of the loopback interface."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
#: Seconds that a server may take to be ready, and to end.
STARTING, ENDING = 180, 60
#: What threads do, by how their names begin; what helps with a forward is part of it.
ROLES = {"decode": "decode", "forward": "forward", "share": "forward"}


class Served:
    """A `tocom-serve` process that also tells where its CPU time goes."""

    def __init__(
        self, process: "subprocess.Popen[bytes]", port: int, asking: socket.socket
    ) -> None:
        self.process = process
        self.port = port
        self.url = f"http://127.0.0.1:{port}"
        self._asking = asking

    def cpu(self) -> Counter[str]:
        """Return the CPU seconds so far of `decode`, `forward`, `HTTP` and `other`."""
        self._asking.sendall(b"?")
        return Counter(json.loads(self._asking.makefile().readline()))

    def memory(self) -> float:
        """Return the resident memory in MiB."""
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 2**20

    def threads(self) -> int:
        """Return how many threads it has."""
        return sum(1 for _ in Path(f"/proc/{self.process.pid}/task").iterdir())

    def open_files(self) -> int:
        """Return how many file descriptors it has, connections among them."""
        return sum(1 for _ in Path(f"/proc/{self.process.pid}/fd").iterdir())


@contextmanager
def serving(log: Path, **settings: Any) -> Iterator[Served]:
    """Run `tocom-serve` until the end of the block.

    Args:
        log: file that takes what the server prints.
        settings: of the server; what is not named keeps its default.

    Raises:
        RuntimeError: if it does not get ready.
    """
    ours, theirs = socket.socketpair()
    port = free_port()
    given = {
        f"TOCOM_{name.upper()}": value if isinstance(value, str) else json.dumps(value)
        for name, value in {"port": port, **settings}.items()
    }
    command = [sys.executable, "-m", "benchmarks.served", str(theirs.fileno())]
    with (
        ours,
        theirs,
        running(command, f"http://127.0.0.1:{port}/readyz", log, given, theirs) as process,
    ):
        yield Served(process, port, ours)


@contextmanager
def running(
    command: Sequence[str],
    url: str,
    log: Path,
    variables: dict[str, str] | None = None,
    passed: socket.socket | None = None,
) -> Iterator["subprocess.Popen[bytes]"]:
    """Run a server until the end of the block.

    Args:
        command: starts it.
        url: answers with 200 once it is ready.
        log: file that takes what it prints.
        variables: of its environment, beside ours.
        passed: a socket that it inherits.

    Raises:
        RuntimeError: if it does not get ready.
    """
    with log.open("ab") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, env=os.environ | (variables or {}), stdout=output, stderr=output,
            stdin=subprocess.DEVNULL, pass_fds=[passed.fileno()] if passed else [],
            start_new_session=True,
        )  # fmt: skip
    try:
        _wait_until_ready(process, url, log)
        yield process
    finally:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(ENDING)
        # Some servers leave processes behind when they end.
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@contextmanager
def stopped(process: "subprocess.Popen[bytes]") -> Iterator[None]:
    """Stop a server, with the processes that it has started, until the end of the block."""
    os.killpg(process.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.killpg(process.pid, signal.SIGCONT)


def _wait_until_ready(process: "subprocess.Popen[bytes]", url: str, log: Path) -> None:
    give_up = time.monotonic() + STARTING
    while time.monotonic() < give_up:
        with suppress(OSError), urllib.request.urlopen(url, timeout=5):
            return
        if process.poll() is not None:
            break
        time.sleep(0.2)
    last = log.read_text(errors="replace").splitlines()[-5:]
    raise RuntimeError(f"the server did not get ready ({url}); {log} ends with: {last}")


def free_port() -> int:
    """Return a port that nobody listens on at this moment."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def _cpu_times() -> Counter[str]:
    """Return the CPU seconds of this process by what its threads do."""
    times: Counter[str] = Counter()
    for thread in threading.enumerate():
        assert thread.ident is not None
        spent = time.clock_gettime(time.pthread_getcpuclockid(thread.ident))
        times[_role(thread)] += spent
    # Threads that Python does not know are torch's, which help with the forward.
    times["forward"] += time.process_time() - sum(times.values())
    return times


def _role(thread: threading.Thread) -> str:
    if thread is threading.main_thread():
        return "HTTP"
    return next((role for name, role in ROLES.items() if thread.name.startswith(name)), "other")


def _answer(asked: socket.socket) -> None:
    while asked.recv(1):
        asked.sendall(json.dumps(_cpu_times()).encode() + b"\n")


def _main(file_number: str) -> int:
    """Be a `tocom-serve` that is asked for its CPU times over a socket."""
    from server.cli import main

    asked = socket.socket(fileno=int(file_number))
    threading.Thread(target=_answer, args=[asked], name="account", daemon=True).start()
    return main([])


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1]))
