"""Whether a server that runs for long under all kinds of requests keeps its memory and its temper.

    python -m benchmarks.serve_soak --pictures eval.tar --minutes 10

Some clients ask for classifications at all rates and `auto`, several images at once, features,
streams and what the server tells of itself; one request in ten is bad: damaged and falsely
declared images, parameters that do not exist, clients that leave. Each must get a status that its
kind may get: no bad request may be a fault of the server's, and 503 and 504 mean overload.

Resident memory is read every second. Its slope is that of the second half, when everything has
been used once.
"""

import argparse
import asyncio
import base64
import io
import json
import random
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from PIL import Image

from benchmarks import machine, subject
from benchmarks.estimates import markdown, slope
from benchmarks.served import Served, serving

JPEG = {"Content-Type": "image/jpeg"}
JSON = {"Content-Type": "application/json"}
LINES = {"Content-Type": "application/x-ndjson"}
#: Statuses of a server that has too much to do.
OVERLOAD = (503, 504)
#: Share of requests that are bad; seconds after which a client leaves that does not wait.
BAD, PATIENCE = 0.1, 0.01


@dataclass(frozen=True)
class Ask:
    """A request and the statuses that it may get beside those of overload; none: nobody waits."""

    kind: str
    target: str
    arguments: dict[str, Any]
    allowed: tuple[int, ...] = (200,)
    method: str = "POST"


class Traffic:
    """Requests of all kinds, in random order."""

    def __init__(self, pictures: Sequence[bytes], highest: int, seed: int) -> None:
        self.pictures, self.highest = pictures, highest
        self._chance = random.Random(seed)
        written = io.BytesIO()
        Image.new("1", (20_000, 20_000)).save(written, "PNG")
        self._bomb = written.getvalue()
        self._good: list[Callable[[], Ask]] = [
            self._form, self._form, self._form, self._body, self._body, self._several,
            self._encoded, self._features, self._stream, self._state,
        ]  # fmt: skip

    def next(self) -> Ask:
        """Return any request."""
        if self._chance.random() < BAD:
            return self._chance.choice(self._bad())
        return self._chance.choice(self._good)()

    def _picture(self) -> bytes:
        return self._chance.choice(self.pictures)

    def _rate(self) -> str:
        return self._chance.choice([str(self._chance.randint(0, self.highest)), "auto"])

    def _form(self) -> Ask:
        options = self._chance.choice(("", "&logits=true", "&merge_map=true", "&compensate=false"))
        target = f"/v1/classify?rate={self._rate()}{options}"
        return Ask("form", target, {"files": {"file": self._picture()}})

    def _body(self) -> Ask:
        target = f"/v1/classify?rate={self._rate()}&deadline_ms={self._chance.randint(50, 2000)}"
        return Ask("body", target, {"content": self._picture(), "headers": JPEG})

    def _several(self) -> Ask:
        files = [("file", self._picture()) for _ in range(self._chance.randint(2, 6))]
        return Ask("several", f"/v1/classify?rate={self._rate()}", {"files": files})

    def _encoded(self) -> Ask:
        images = [base64.b64encode(self._picture()).decode() for _ in range(2)]
        content = json.dumps({"images": images})
        target = f"/v1/classify?rate={self._rate()}"
        return Ask("base64", target, {"content": content, "headers": JSON})

    def _features(self) -> Ask:
        target = f"/v1/embed?rate={self._rate()}&normalize=true"
        return Ask("features", target, {"files": {"file": self._picture()}})

    def _stream(self) -> Ask:
        images = [base64.b64encode(self._picture()).decode() for _ in range(6)]
        content = "\n".join(json.dumps({"b64": image}) for image in [*images, "bm90IGFuIGltYWdl"])
        target = f"/v1/classify/batch?rate={self._rate()}"
        return Ask("stream", target, {"content": content, "headers": LINES})

    def _state(self) -> Ask:
        target = self._chance.choice(("/v1/models", "/v1/status", "/metrics", "/readyz"))
        return Ask("state", target, {}, method="GET")

    def _bad(self) -> list[Ask]:
        picture = self._picture()
        cut = picture[: self._chance.randint(1, len(picture) - 1)]
        body = {"content": picture, "headers": JPEG}

        def image(kind: str, content: bytes, *allowed: int) -> Ask:
            return Ask(kind, "/v1/classify", {"content": content, "headers": JPEG}, allowed)

        return [
            # Cut in its last bytes it may still be whole; in its first ones it is nothing.
            image("cut off", cut, 200, 415, 422),
            image("no image", b"<html>" * 1000, 415),
            image("empty", b"", 400),
            image("bomb", self._bomb, 413),
            Ask("no such rate", "/v1/classify?rate=99", body, (422,)),
            Ask("no such model", "/v1/classify?model=none", body, (404,)),
            Ask("no such parameter", "/v1/classify?rat=8", body, (422,)),
            Ask("no JSON", "/v1/classify", {"content": "{", "headers": JSON}, (400,)),
            Ask("no field", "/v1/classify", {"files": {"photo": picture}}, (400, 422)),
            Ask("leaves", "/v1/classify", body, ()),
        ]


@dataclass
class Found:
    """What a soak has found so far.

    Attributes:
        answers: by (kind, status); status 0: the client left or the connection broke.
        wrong: answers that their kind may not get, as text.
        memory: (seconds, MiB) of the server.
    """

    answers: Counter[tuple[str, int]] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    memory: list[tuple[float, float]] = field(default_factory=list)

    def add(self, ask: Ask, status: int, text: str) -> None:
        """Take note of an answer."""
        self.answers[ask.kind, status] += 1
        # Who leaves may be answered first, or find the server busy.
        allowed = ask.allowed or (0, 200)
        if status not in allowed and status not in OVERLOAD:
            self.wrong.append(f"{ask.kind}: {status} {text[:200]}")


async def soak(served: Served, traffic: Traffic, seconds: float, clients: int) -> Found:
    """Let clients ask one request after the other for some seconds."""
    found = Found()
    began = time.monotonic()

    async def work(client: httpx.AsyncClient) -> None:
        while time.monotonic() - began < seconds:
            ask = traffic.next()
            timeout = 60 if ask.allowed else PATIENCE
            try:
                answer = await client.request(
                    ask.method, ask.target, timeout=timeout, **ask.arguments
                )
                found.add(ask, answer.status_code, answer.text)
            except httpx.HTTPError as error:
                found.add(ask, 0, repr(error))

    async def watch() -> None:
        while True:
            found.memory.append((time.monotonic() - began, served.memory()))
            await asyncio.sleep(1)

    watching = asyncio.create_task(watch())
    async with httpx.AsyncClient(base_url=served.url) as client:
        await asyncio.gather(*(work(client) for _ in range(clients)))
    watching.cancel()
    return found


def report(found: Found) -> str:
    """Return what was found, in Markdown."""
    statuses: Counter[int] = Counter()
    for (_, status), count in found.answers.items():
        statuses[status] += count
    half = found.memory[len(found.memory) // 2 :]
    times, sizes = zip(*half, strict=True)
    grows, error = (60 * each for each in slope(times, sizes))
    quarter = len(half) // 2
    growth = statistics.median(sizes[quarter:]) - statistics.median(sizes[:quarter])
    faults = sum(n for status, n in statuses.items() if status >= 500 and status not in OVERLOAD)
    header = ["requests", "2xx", "4xx", "503, 504", "other 5xx", "left", "not as expected",
              "MiB at the start", "at half", "at the end", "MiB a minute, second half",
              "third to fourth quarter, MiB"]  # fmt: skip
    row = [
        statuses.total(),
        sum(n for status, n in statuses.items() if 200 <= status < 300),
        sum(n for status, n in statuses.items() if 400 <= status < 500),
        sum(statuses[status] for status in OVERLOAD), faults, statuses[0], len(found.wrong),
        f"{found.memory[0][1]:.0f}", f"{sizes[0]:.0f}", f"{sizes[-1]:.0f}",
        f"{grows:+.2f} ± {1.96 * error:.2f}", f"{growth:+.1f}",
    ]  # fmt: skip
    kinds = [[kind, status, count] for (kind, status), count in sorted(found.answers.items())]
    lines = [markdown(header, [row]), "", markdown(["kind", "status", "requests"], kinds)]
    lines += ["", *(f"- {each}" for each in found.wrong[:20])]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print Markdown tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    subject.add_arguments(parser)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    what = subject.from_arguments(options)
    print(f"{machine.describe()}.\n\n{what.described}; {options.clients} clients, "
          f"{options.minutes:g} minutes.\n")  # fmt: skip
    with (
        tempfile.TemporaryDirectory() as folder,
        serving(Path(folder) / "log", models=what.served) as served,
    ):
        highest = httpx.get(f"{served.url}/v1/models/benchmark").json()["max_rate"]
        traffic = Traffic(what.pictures, highest, options.seed)
        found = asyncio.run(soak(served, traffic, 60 * options.minutes, options.clients))
    print(report(found))


if __name__ == "__main__":
    main()
