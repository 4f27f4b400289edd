"""`tocom-serve`: serve models over HTTP, or check them, or use one without a server.

Reads the arguments; what they ask for is imported after that, for which torch takes seconds.
"""

import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from types import FrameType
from typing import TYPE_CHECKING

from server import arguments as allowed
from tocom import TocomError

if TYPE_CHECKING:
    from server.settings import Settings
    from server.web.serving import Serving


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Returns:
        0; 1 if a photograph could not be classified; 2 if the command could not be done; 130 if
        Ctrl-C ended it. A server that has come to serve ends in no other way, and with 0.
    """
    parsed = allowed.parser().parse_args(arguments)
    try:
        settings = allowed.settings(parsed)
        if parsed.command == "serve":
            _serve(settings)
            return 0
        with _ended_at_once():
            from server import commands
        return commands.run(settings, parsed)
    except TocomError as error:
        print(f"tocom-serve: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


def _serve(settings: "Settings") -> None:
    from server import address

    # First, so that a port in use is told before anything is loaded for it.
    with closing(address.bind(settings.host, settings.port)) as listener, _ended_at_once():
        from server import process

        where = address.url(listener)

        def opened() -> None:
            print(f"Listening on {where}: 503 until the models are ready ...", flush=True)

        def ready(serving: "Serving") -> None:
            from server import commands

            commands.greet(serving, where)

        process.serve(settings, listener, opened, ready)


@contextmanager
def _ended_at_once() -> Iterator[None]:
    """Let Ctrl-C and SIGTERM end the process, without a traceback.

    A KeyboardInterrupt may get lost in an import, and in the first process of a container SIGTERM
    does nothing by itself.
    """

    def end(sig: int, frame: FrameType | None) -> None:  # noqa: ARG001
        os._exit(128 + sig)

    former = {sig: signal.signal(sig, end) for sig in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for sig, handler in former.items():
            signal.signal(sig, handler)


if __name__ == "__main__":
    sys.exit(main())
