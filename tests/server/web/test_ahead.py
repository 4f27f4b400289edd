"""Reading ahead: what arrives is passed on, and a client's going is heard without a reader."""

import asyncio

import pytest

from server.web.ahead import AHEAD, Ahead
from tests.server.v1.conversation import settle
from tests.server.works import PATIENCE

GONE = {"type": "http.disconnect"}


def part(body: bytes, more_body: bool = True) -> dict:
    return {"type": "http.request", "body": body, "more_body": more_body}


def run(talk, *messages):
    """Run a conversation with what reads some messages, beside its watch."""

    async def both() -> None:
        to_read: asyncio.Queue = asyncio.Queue()
        for message in messages:
            to_read.put_nowait(message)
        ahead = Ahead(to_read.get)
        watch = asyncio.create_task(ahead.watch())
        await asyncio.wait_for(talk(ahead, watch, to_read), PATIENCE)
        watch.cancel()

    asyncio.run(both())


def test_a_body_is_passed_on_whole():
    async def talk(ahead, watch, to_read):
        body, more = b"", True
        while more:
            message = await ahead.receive()
            body, more = body + message["body"], message["more_body"]
        assert body == b"one two three"

    run(talk, part(b"one "), part(b""), part(b"two "), part(b"three", more_body=False))


def test_a_client_that_goes_is_noticed_though_nobody_reads():
    async def talk(ahead, watch, to_read):
        assert await watch

    run(talk, part(b"one"), part(b"two"), GONE)


def test_so_much_is_read_ahead_and_no_more():
    async def talk(ahead, watch, to_read):
        await settle()
        assert to_read.qsize() == 2
        assert len((await ahead.receive())["body"]) == AHEAD + 2
        await settle()
        assert to_read.qsize() == 0
        assert await watch

    run(talk, part(bytes(AHEAD)), part(b"ab"), part(b"c"), GONE)


def test_what_is_dropped_is_read_on():
    async def talk(ahead, watch, to_read):
        await settle()
        await ahead.drop()
        assert await watch

    run(talk, part(bytes(AHEAD + 1)), part(bytes(AHEAD + 1)), part(b"c"), GONE)


def test_a_failure_is_for_who_reads():
    async def fail():
        raise LookupError("no such thing")

    async def talk() -> None:
        ahead = Ahead(fail)
        assert not await ahead.watch()
        with pytest.raises(LookupError, match="no such thing"):
            await ahead.receive()

    asyncio.run(talk())
