"""Whether a server that runs for long under all kinds of requests keeps its memory and its temper.

    python -m benchmarks.serve_soak --pictures eval.tar --minutes 120 --folder out

Some clients ask for classifications at all rates, `auto` and `cascade`, several images at once,
features (also as OpenAI's clients do), labels as Hugging Face's do, streams and what the server
tells of itself; one request in ten is bad: damaged and falsely declared images, parameters that do
not exist, clients that leave. Meanwhile the model's bank changes every two minutes. Each request
must get a status that its kind may get: no bad request may be a fault of the server's, and 503 and
504 mean overload.

Resident memory, threads and open files are read every second. Slopes are those of the second half,
when everything has been used once.
"""

import argparse
import asyncio
import base64
import io
import itertools
import json
import random
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
from PIL import Image

from benchmarks import machine, subject
from benchmarks.estimates import markdown, slope
from benchmarks.serve_swap import KEY, publish, variants
from benchmarks.served import Served, serving

JPEG = {"Content-Type": "image/jpeg"}
JSON = {"Content-Type": "application/json"}
LINES = {"Content-Type": "application/x-ndjson"}
#: Statuses of a server that has too much to do.
OVERLOAD = (503, 504)
#: Share of requests that are bad; seconds after which a client leaves that does not wait.
BAD, PATIENCE = 0.1, 0.01
#: Seconds between two changes of the bank; bytes of answers that the server keeps.
SWAP, KEPT = 120.0, 2**20
#: Minutes of the shortest soak: its second half has readings enough for a slope.
SHORTEST = 1 / 6
#: What is read of the server every second.
READ = ("MiB", "threads", "open files")


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
            self._encoded, self._features, self._openai, self._hugging_face, self._stream,
            self._state,
        ]  # fmt: skip

    def next(self) -> Ask:
        """Return any request."""
        if self._chance.random() < BAD:
            return self._chance.choice(self._bad())
        ask = self._chance.choice(self._good)()
        # A cascade is refused while a bank is served that it was not calibrated for, and a deadline
        # that even an idle server could not keep.
        may_be_refused = any(word in ask.target for word in ("rate=cascade", "deadline_ms"))
        return replace(ask, allowed=(200, 422)) if may_be_refused else ask

    def _picture(self) -> bytes:
        return self._chance.choice(self.pictures)

    def _rate(self) -> str:
        rate = str(self._chance.randint(0, self.highest))
        return self._chance.choice([rate, rate, "auto", "cascade"])

    def _form(self) -> Ask:
        options = self._chance.choice(("", "&logits=true", "&merge_map=true", "&compensate=false"))
        rate = self._chance.choice([self._chance.randint(0, self.highest), "auto"])
        target = f"/v1/classify?rate={rate}{options}"
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

    def _openai(self) -> Ask:
        image = f"data:image/jpeg;base64,{base64.b64encode(self._picture()).decode()}"
        content = json.dumps({"model": "benchmark", "input": [image], "encoding_format": "base64"})
        return Ask("OpenAI", "/v1/embeddings", {"content": content, "headers": JSON})

    def _hugging_face(self) -> Ask:
        target = f"/models/benchmark?rate={self._rate()}"
        return Ask("Hugging Face", target, {"content": self._picture(), "headers": JPEG})

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
        state: seconds, and of the server then what `READ` names.
        swaps: statuses of the changes of the bank.
    """

    answers: Counter[tuple[str, int]] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    state: list[tuple[float, float, int, int]] = field(default_factory=list)
    swaps: Counter[int] = field(default_factory=Counter)

    def add(self, ask: Ask, status: int, text: str) -> None:
        """Take note of an answer."""
        self.answers[ask.kind, status] += 1
        # Who leaves may be answered first, or find the server busy.
        allowed = ask.allowed or (0, 200)
        if status not in allowed and status not in OVERLOAD:
            self.wrong.append(f"{ask.kind}: {status} {text[:200]}")


async def soak(
    served: Served, traffic: Traffic, seconds: float, clients: int, digests: Sequence[str] = ()
) -> Found:
    """Let clients ask one request after the other for some seconds, while the bank changes."""
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
            state = served.memory(), served.threads(), served.open_files()
            found.state.append((time.monotonic() - began, *state))
            await asyncio.sleep(1)

    async def swap(client: httpx.AsyncClient) -> None:
        for digest in itertools.cycle(digests):
            await asyncio.sleep(SWAP)
            address, key = "/v1/models/benchmark/bank", {"X-API-Key": KEY}
            answer = await client.put(address, json={"bank": digest}, headers=key, timeout=60)
            found.swaps[answer.status_code] += 1

    async with httpx.AsyncClient(base_url=served.url) as client:
        beside = [asyncio.create_task(watch()), asyncio.create_task(swap(client))]
        await asyncio.gather(*(work(client) for _ in range(clients)))
        for each in beside:
            if each.done():
                each.result()  # had it failed, readings or changes would just have stopped
            each.cancel()
    return found


def report(found: Found) -> str:
    """Return what was found, in Markdown."""
    statuses: Counter[int] = Counter()
    for (_, status), count in found.answers.items():
        statuses[status] += count
    faults = sum(n for status, n in statuses.items() if status >= 500 and status not in OVERLOAD)
    header = ["requests", "2xx", "4xx", "503, 504", "other 5xx", "left", "not as expected", "swaps"]
    row = [
        statuses.total(),
        sum(n for status, n in statuses.items() if 200 <= status < 300),
        sum(n for status, n in statuses.items() if 400 <= status < 500),
        sum(statuses[status] for status in OVERLOAD), faults, statuses[0], len(found.wrong),
        ", ".join(f"{n} x {status}" for status, n in found.swaps.items()),
    ]  # fmt: skip
    kinds = [[kind, status, count] for (kind, status), count in sorted(found.answers.items())]
    lines = [markdown(header, [row]), "", grown(found), "",
             markdown(["kind", "status", "requests"], kinds)]  # fmt: skip
    lines += ["", *(f"- {each}" for each in found.wrong[:20])]
    return "\n".join(lines)


def grown(found: Found) -> str:
    """Return what became of memory, threads and files, in Markdown."""
    half = found.state[len(found.state) // 2 :]
    times = [each[0] for each in half]
    rows = []
    for number, what in enumerate(READ, 1):
        values = [each[number] for each in half]
        grows, error = (3600 * each for each in slope(times, values))
        quarter = len(half) // 2
        growth = statistics.median(values[quarter:]) - statistics.median(values[:quarter])
        rows.append([what, f"{found.state[0][number]:.0f}", f"{values[0]:.0f}",
                     f"{values[-1]:.0f}", f"{max(each[number] for each in found.state):.0f}",
                     f"{grows:+.1f} ± {1.96 * error:.1f}", f"{growth:+.1f}"])  # fmt: skip
    header = ["", "at the start", "at half", "at the end", "most", "an hour, second half",
              "third to fourth quarter"]  # fmt: skip
    return markdown(header, rows)


def plot(found: Found, folder: Path) -> None:
    """Write `soak.svg` and `.png`: memory, threads and open files over time."""
    import matplotlib

    matplotlib.use("Agg")  # files only: no display is needed

    import matplotlib.pyplot as plt

    minutes = [each[0] / 60 for each in found.state]
    figure, axes = plt.subplots(3, 1, figsize=(8, 6), sharex=True, layout="constrained")
    for number, (axis, what) in enumerate(zip(axes, READ, strict=True), 1):
        axis.plot(minutes, [each[number] for each in found.state], lw=0.8)
        axis.set(ylabel=what, ylim=(0, None))
        axis.grid(alpha=0.3)
    axes[-1].set(xlabel="minutes")
    for suffix in ("svg", "png"):
        figure.savefig(folder / f"soak.{suffix}", dpi=130)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print Markdown tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    subject.add_arguments(parser)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where to write report, plot and log")
    options = parser.parse_args(argv)
    if options.minutes < SHORTEST:
        parser.error(f"--minutes must be at least {SHORTEST:.2g}, got {options.minutes:g}")
    what = subject.from_arguments(options)
    bank = what.load().bank
    if bank is None:
        raise SystemExit("a soak changes the bank, so it needs a --bank")
    print(f"{machine.describe()}.\n\n{what.described}; {options.clients} clients, "
          f"{options.minutes:g} minutes.\n")  # fmt: skip
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        with serving(
            folder / "server.log", models=what.served, store=str(Path(temporary) / "store"),
            admin_key=KEY, cache_bytes=KEPT,
        ) as served:  # fmt: skip
            banks = variants(bank)
            publish(served, banks[1:], Path(temporary))
            highest = httpx.get(f"{served.url}/v1/models/benchmark").json()["max_rate"]
            traffic = Traffic(what.pictures, highest, options.seed)
            digests = [each.info.digest for each in (*banks[1:], banks[0])]
            seconds = 60 * options.minutes
            found = asyncio.run(soak(served, traffic, seconds, options.clients, digests))
    print(report(found))
    if options.folder is not None:
        (options.folder / "soak.md").write_text(report(found) + "\n")
        plot(found, options.folder)


if __name__ == "__main__":
    main()
