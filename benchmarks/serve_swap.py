"""Whether banks can be swapped and servers be ended under load, and nobody notices.

    python -m benchmarks.serve_swap --pictures eval.tar

Swap: while requests at all rates arrive, the model's bank is changed every second through the
admin interface, among the model's own, two changed copies of it and none. Every answer says by
its digest which bank it was made with, and is compared with what that bank gives the same picture
at the same rate by itself, in this process. Another size of batch is another order of sums: where
that decides between two tokens that are equally alike, another pair merges, and rightly so. Such
answers (closest decision taken by less than 1e-5 of cosine) are counted apart.

Drain: at 80 % of the server's capacity it gets SIGTERM. Like a load balancer, the client asks
/readyz and sends no more once that says no. All that was sent must be answered.
"""

import argparse
import asyncio
import itertools
import json
import math
import random
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import httpx
import torch
from torch import Tensor

from adapters import Bank
from benchmarks import machine, subject
from benchmarks.estimates import markdown
from benchmarks.load import (
    Connections,
    Exchange,
    Request,
    Step,
    closed_loop,
    form,
    open_loop,
    poisson_plan,
    request,
    run_loop,
    upload,
)
from benchmarks.served import Served, serving
from benchmarks.subject import Subject
from server.models.pictures import prepare
from server.models.served import ServedModel
from server.settings import Settings
from tocom import trace

KEY = "a-key-for-benchmarks"
#: Seconds between two swaps; seconds between two looks at /readyz.
SWAP, LOOK = 1.0, 0.05
#: Largest difference of logits that another size of batch may make, and how close is a tie.
SAME, TIE = 1e-4, 1e-5


@dataclass(frozen=True)
class Question:
    """What decides the logits: a bank's digest (None: nothing to apply), a rate and a picture."""

    digest: str | None
    rate: int
    picture: int


class Offline:
    """What each bank gives by itself, image by image."""

    def __init__(
        self, model: ServedModel, banks: Sequence[Bank], pictures: Sequence[bytes]
    ) -> None:
        settings = Settings()
        self.handles = {bank.info.digest: model.with_bank(bank) for bank in banks}
        self.model = model
        self.images = [prepare(picture, model, settings)[None] for picture in pictures]
        self._known: dict[Question, tuple[Tensor, bool]] = {}

    def __call__(self, question: Question) -> tuple[Tensor, bool]:
        """Return the logits [C] and whether a decision was a tie."""
        if question not in self._known:
            model = self.handles.get(question.digest, self.model)
            variant = model.at(question.rate, compensate=question.digest is not None).variant()
            with torch.inference_mode():
                traced = trace(
                    model.backbone.model, self.images[question.picture], variant.rate,
                    variant.delta, proportional=variant.proportional, adapter=variant.adapter,
                    ladder=variant.ladder, learned=variant.learned,
                )  # fmt: skip
            self._known[question] = traced.logits[0], bool(traced.margin[0] < TIE)
        return self._known[question]

    def least_difference(self) -> float:
        """Return how far apart two banks' answers to one question are, at least.

        Far above `SAME`, or comparing would not tell one bank from another.
        """
        answers: dict[tuple[int, int], list[Tensor]] = {}
        for question, (logits, _) in self._known.items():
            if question.rate != self.model.source:
                answers.setdefault((question.rate, question.picture), []).append(logits)
        pairs = itertools.chain(*(itertools.combinations(each, 2) for each in answers.values()))
        return min((float((a - b).abs().max()) for a, b in pairs), default=math.nan)


def variants(bank: Bank) -> list[Bank]:
    """Return a bank and two copies whose plug-ins do half and twice as much."""
    changed = []
    for name, factor in (("half", 0.5), ("twice", 2.0)):
        tensors = {
            key: factor * each if key.endswith(".B") else each for key, each in bank.tensors.items()
        }
        about = {"name": f"benchmark-{name}", "digest": "", "evaluation": {}}
        info = bank.info.model_copy(update=about)
        changed.append(Bank(info, tensors))
    return [bank, *changed]


def publish(served: Served, banks: Sequence[Bank], folder: Path) -> None:
    """Upload banks to the server's store."""
    for bank in banks:
        saved = bank.save(folder / bank.info.name)
        files = {"info": "bank.json", "plugins": "plugins.safetensors"}
        httpx.post(
            f"{served.url}/v1/banks",
            files={field: (saved / file).read_bytes() for field, file in files.items()},
            headers={"X-API-Key": KEY},
            timeout=60,
        ).raise_for_status()


async def swap_under_load(
    served: Served, digests: Sequence[str | None], plan: list[float], requests: list[Request]
) -> tuple[list[Exchange], list[float]]:
    """Send requests while the bank changes; return the answers and the seconds of each swap."""
    over = asyncio.Event()
    swaps = asyncio.create_task(_swap(served.port, digests, over))
    answers = await open_loop(served.port, plan, requests)
    over.set()
    return answers, await swaps


async def _swap(port: int, digests: Sequence[str | None], over: asyncio.Event) -> list[float]:
    connections = Connections(port)
    clock = asyncio.get_running_loop().time
    taken: list[float] = []
    for digest in itertools.cycle(digests):
        began = clock()
        method = "DELETE" if digest is None else "PUT"
        body = b"" if digest is None else json.dumps({"bank": digest}).encode()
        change = request(method, "/v1/models/benchmark/bank", body, key=KEY)
        status, answer = await connections.ask(change)
        if status != 200:
            raise RuntimeError(f"a swap failed: {status} {answer!r}")
        taken.append(clock() - began)
        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(over.wait(), max(0.0, SWAP - taken[-1]))
        if over.is_set():
            break
    connections.close()
    return taken


@dataclass(frozen=True)
class Verdicts:
    """How many answers were `as offline`, `ties`, `other` or no answers; how many by each bank."""

    answers: Counter[str]
    banks: Counter[str | None]


def judge(exchanges: Sequence[Exchange], pictures: Sequence[int], offline: Offline) -> Verdicts:
    """Compare the answers to some pictures with what their banks give offline."""
    found = Verdicts(Counter(), Counter())
    for exchange, picture in zip(exchanges, pictures, strict=True):
        if exchange.status != 200:
            found.answers[f"status {exchange.status}"] += 1
            continue
        answer = exchange.json()
        digest = answer["bank_digest"] if answer["compensate"] else None
        logits, tied = offline(Question(digest, answer["rate"], picture))
        gap = float((torch.tensor(answer["logits"]) - logits).abs().max())
        found.answers["as offline" if gap <= SAME else "ties" if tied else "other"] += 1
        found.banks[answer["bank_digest"]] += 1
    return found


def swap(what: Subject, served: Served, options: argparse.Namespace, folder: Path) -> None:
    """Swap banks under load and print what became of the requests."""
    model = what.load()
    if model.bank is None:
        raise SystemExit("swapping needs a --bank")
    banks = variants(model.bank)
    publish(served, banks[1:], folder)
    chance = random.Random(options.seed)
    pictures = what.pictures[: options.swap_pictures]
    forms = [form(picture) for picture in pictures]
    rate = options.load * capacity(served, forms, model.max_rate)
    plan = poisson_plan([Step(options.swap_seconds, rate)], options.seed)
    chosen = chance.choices(range(len(pictures)), k=len(plan))
    kinds = [*range(model.max_rate + 1), "auto", "auto&deadline_ms=2000",
             f"{model.max_rate}&compensate=false"]  # fmt: skip
    asked = [
        upload(f"/v1/classify?logits=true&rate={chance.choice(kinds)}", forms[picture])
        for picture in chosen
    ]
    digests = [bank.info.digest for bank in banks]
    answers, swaps = run_loop(
        swap_under_load(served, [*digests[1:], None, digests[0]], plan, asked)
    )
    offline = Offline(model, banks, pictures)
    found = judge(answers, chosen, offline)
    verdicts = ("as offline", "ties", "other")
    counts = [found.answers.pop(verdict, 0) for verdict in verdicts]
    rows = [[len(answers), f"{rate:.1f}", len(swaps), f"{1000 * max(swaps):.0f}", *counts,
             found.answers.total(), ", ".join(map(str, found.banks.values())),
             f"{offline.least_difference():.2g}"]]  # fmt: skip
    header = ["requests", "offered/s", "swaps", "slowest swap, ms", *verdicts, "errors",
              "answers by bank", "banks differ by at least"]  # fmt: skip
    print(f"\nSwap:\n\n{markdown(header, rows)}\n", flush=True)
    for status, count in found.answers.items():
        print(f"- {count} x {status}")


def capacity(served: Served, forms: Sequence[bytes], highest: int) -> float:
    """Return the images a second that the server does at all rates, mixed."""
    images = 10 * (highest + 1)
    bodies = itertools.islice(itertools.cycle(forms), images)
    asked = [
        upload(f"/v1/classify?rate={number % (highest + 1)}", body)
        for number, body in enumerate(bodies)
    ]
    exchanges = closed_loop(served.port, asked, concurrency=32)
    return images / max(each.done for each in exchanges)


@dataclass(frozen=True)
class Drained:
    """What became of requests, when SIGTERM was sent (monotonic clock), when it was noticed."""

    answers: list[Exchange]
    asked: float
    noticed: float


async def drain_under_load(
    served: Served, plan: list[float], requests: list[Request], after: float
) -> Drained:
    """Send requests, SIGTERM after some seconds, and no more once the server is not ready."""
    stop = asyncio.Event()
    sending = asyncio.create_task(open_loop(served.port, plan, requests, stop))
    await asyncio.sleep(after)
    connections = Connections(served.port)
    asked = time.monotonic()
    served.process.terminate()
    while (await connections.ask(request("GET", "/readyz")))[0] == 200:
        await asyncio.sleep(LOOK)
    stop.set()
    noticed = time.monotonic()
    answers = await sending
    connections.close()
    return Drained(answers, asked, noticed)


def drain(what: Subject, options: argparse.Namespace, folder: Path) -> None:
    """End servers under load and print what became of the requests."""
    forms = [form(picture) for picture in what.pictures]
    rows = []
    for number in range(options.drains):
        chance = random.Random(options.seed + number)
        log = folder / "log"
        with serving(log, models=what.served, drain_delay_ms=options.delay_ms) as served:
            highest = httpx.get(f"{served.url}/v1/models/benchmark").json()["max_rate"]
            rate = 0.8 * capacity(served, forms, highest)
            plan = poisson_plan([Step(60, rate)], options.seed + number)
            asked = [
                upload(f"/v1/classify?rate={chance.randint(0, highest)}", chance.choice(forms))
                for _ in plan
            ]
            drained = run_loop(drain_under_load(served, plan, asked, options.after))
            code = served.process.wait(60)
            ended = time.monotonic()
        statuses = Counter(each.status for each in drained.answers)
        sent = len(drained.answers)
        rows.append([sent, f"{rate:.1f}", sent - statuses[200],
                     f"{1000 * (drained.noticed - drained.asked):.0f}",
                     f"{ended - drained.asked:.1f}", code])  # fmt: skip
        if statuses.keys() != {200}:
            print(f"- drain {number + 1}: {dict(statuses)}")
    header = ["sent", "offered/s", "lost", "not ready after, ms", "ended after, s", "exit code"]
    print(f"\nDrain:\n\n{markdown(header, rows)}\n", flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print Markdown tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    subject.add_arguments(parser)
    parser.add_argument("--swap-seconds", type=float, default=60, help="0: no swaps")
    parser.add_argument("--swap-pictures", type=int, default=12)
    parser.add_argument("--load", type=float, default=0.6, help="of the capacity, while swapping")
    parser.add_argument("--drains", type=int, default=3)
    parser.add_argument("--after", type=float, default=5, help="seconds from the start to SIGTERM")
    parser.add_argument("--delay-ms", type=int, default=2000, help="the server's drain_delay_ms")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    what = subject.from_arguments(options)
    print(f"{machine.describe()}.\n\n{what.described}.")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if options.swap_seconds:
            settings = {"store": str(folder / "store"), "admin_key": KEY}
            with serving(folder / "log", models=what.served, **settings) as served:
                swap(what, served, options, folder)
        if options.drains:
            drain(what, options, folder)


if __name__ == "__main__":
    main()
