"""What the server logs, as text for people or JSON for programs, a line each."""

import json
import logging
import math
import re
from collections.abc import Mapping
from datetime import datetime, timezone

from server.settings import Settings
from tocom.wording import one_line

_PLAIN = re.compile(r"[\w.:/-]+")


def configure(settings: Settings) -> None:
    """Log to stderr, from `log_level` on, in `log_format`; leave alone what is set up already."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter() if settings.log_format == "json" else TextFormatter())
    logging.basicConfig(handlers=[handler])
    # Said for every connection, which may be many thousand times a second.
    logging.getLogger("asyncio").addFilter(Seldom("socket.accept() out of system resource"))
    logging.getLogger("server.address").addFilter(Seldom("connections are refused"))
    # Ours alone: the libraries' own notes are of no use to who only serves.
    logging.getLogger("server").setLevel(settings.log_level.upper())


class Seldom(logging.Filter):
    """Lets a message that begins in a certain way pass once in `PAUSE` seconds."""

    PAUSE = 10.0

    def __init__(self, beginning: str) -> None:
        super().__init__()
        self._beginning = beginning
        self._next = -math.inf

    def filter(self, record: logging.LogRecord) -> bool:
        """Tell whether a record is logged."""
        if not record.getMessage().startswith(self._beginning):
            return True
        if record.created < self._next:
            return False
        self._next = record.created + self.PAUSE
        return True


class TextFormatter(logging.Formatter):
    """A line for people: time, level, message, then the arguments that the message leaves out."""

    default_msec_format = "%s.%03d"

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        """Return the line of a record, and no other: what it quotes cannot begin a second one."""
        more = [
            f"{name}={_word(value)}"
            for name, value in _fields(record).items()
            if f"%({name})" not in str(record.msg)
        ]
        record.message = " ".join([record.message.rstrip(), *more])
        return one_line(super().formatMessage(record))


class JsonFormatter(logging.Formatter):
    """A line for programs: an object with time, level, logger and message, and the arguments."""

    def format(self, record: logging.LogRecord) -> str:
        """Return a record as JSON."""
        line = {
            "time": datetime.fromtimestamp(record.created, timezone.utc).isoformat(
                timespec="milliseconds"
            ),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **_fields(record),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def _fields(record: logging.LogRecord) -> dict[str, object]:
    """Return the arguments of a record that has them by name."""
    if not isinstance(record.args, Mapping):
        return {}
    return {name: value for name, value in record.args.items() if value is not None}


def _word(value: object) -> str:
    text = str(value)
    return text if _PLAIN.fullmatch(text) else json.dumps(text)
