"""Running the images of a request, for every route that takes them as files."""

from functools import partial

from fastapi import Request

from server.engine.job import Answer
from server.inference.cache import digests
from server.inference.cascade import CascadeWork
from server.inference.query import RateQuery
from server.inference.ran import Ran
from server.inference.run import AnyWork, Deadline, answer_all, noted, work_for
from server.models.pictures import prepare
from server.models.served import ServedModel
from server.observe.notes import note
from server.v1.uploads import aside
from server.web.access import caller_of, charge, priority_of
from server.web.serving import Serving
from tocom import TocomError


def asked_for(
    request: Request, serving: Serving, model: ServedModel, query: RateQuery, trace: bool = False
) -> AnyWork:
    """Return the work that a request asks for, and note it.

    Raises:
        TocomError: what `work_for` raises.
    """
    work = work_for(model, query, serving.settings, trace)
    note(request, **noted(work))
    return work


async def run(
    request: Request,
    serving: Serving,
    work: AnyWork,
    images: list[bytes] | list[bytearray],
    deadline: Deadline,
) -> list[Answer | Exception]:
    """Run the images of a request, but those whose answers are kept.

    Each is answered, or fails, by itself.

    Args:
        request: pays for them, and is watched for its client's going.
        serving: has the engine.
        work: what to do with each.
        images: their files; taken out of the list, so that each is freed once it is decoded.
        deadline: of all.

    Raises:
        ServerError: if they cannot be taken.
        ClientDisconnect: if nobody waits for them any more.
    """
    charge(request, len(images) - 1)
    caller, cache = caller_of(request), serving.cache
    name = caller.name if caller else None
    pictures: list[bytes] = []
    found: list[Answer | Exception | None] = [None] * len(images)
    if cache:
        pictures = await aside(partial(digests, images), sum(map(len, images)))
        if not isinstance(work, CascadeWork):  # of which only its runs tell the rate
            found = [*cache.find(pictures, work, name)]
    missing = [index for index, answer in enumerate(found) if answer is None]
    preparations = [
        partial(prepare, images[index], work.model, serving.settings) for index in missing
    ]
    images.clear()
    if missing:
        ran = await answer_all(
            request, serving.engine, work, [*preparations], deadline, priority_of(request)
        )
        for index, outcome in zip(missing, ran, strict=True):
            found[index] = outcome
            if cache and isinstance(outcome, Answer):
                cache.keep(pictures[index], outcome, name)
    outcomes = [outcome for outcome in found if outcome is not None]
    if isinstance(first := outcomes[0], Answer):
        note(request, **Ran.of(first).notes)
    return outcomes


def whole(outcomes: list[Answer | Exception], what: str) -> list[Answer]:
    """Return the answers to all images, or raise why one has none.

    Args:
        outcomes: of the images, in their order.
        what: they are called in messages.

    Raises:
        Exception: what the first one without an answer failed with; a TocomError names its place.
    """
    answers = []
    for index, outcome in enumerate(outcomes):
        if isinstance(outcome, Exception):
            if len(outcomes) > 1 and isinstance(outcome, TocomError):
                outcome.args = (f"{what} {index}: {outcome}",)
            raise outcome
        answers.append(outcome)
    return answers
