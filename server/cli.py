"""`tocom-serve`: serve models over HTTP, or check them, or use one without a server.

Reads the arguments; what they ask for is imported after that, for which torch takes seconds.
"""

import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

from server import arguments as allowed


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Returns:
        0; 1 if a photograph could not be classified; 2 if the command could not be done; 130 if
        Ctrl-C ended it, but for a server, which is ended in no other way.
    """
    parsed = allowed.parser().parse_args(arguments)
    is_server = parsed.command == "serve"
    try:
        with _ended_at_once(is_server):
            from server import commands
        return commands.run(parsed)
    except KeyboardInterrupt:
        return 0 if is_server else 128 + signal.SIGINT


@contextmanager
def _ended_at_once(is_server: bool) -> Iterator[None]:
    """Let Ctrl-C and SIGTERM end the process, without a traceback.

    A KeyboardInterrupt may get lost in an import, and in the first process of a container SIGTERM
    does nothing by itself.
    """

    def end(sig: int, frame: FrameType | None) -> None:  # noqa: ARG001
        os._exit(0 if is_server else 128 + sig)

    former = {sig: signal.signal(sig, end) for sig in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for sig, handler in former.items():
            signal.signal(sig, handler)


if __name__ == "__main__":
    sys.exit(main())
