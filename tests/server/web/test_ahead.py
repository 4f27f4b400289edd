"""Reading ahead: what arrives is passed on, and a client's going is heard without a reader."""

import asyncio
from collections import Counter

import pytest

from server.web.ahead import AHEAD, Ahead
from tests.server.v1.conversation import settle
from tests.server.works import PATIENCE

GONE = {"type": "http.disconnect"}


def part(body: bytes, more_body: bool = True) -> dict:
    return {"type": "http.request", "body": body, "more_body": more_body}


async def whole(ahead) -> list[bytes]:
    """Receive a body to its end; returns its pieces."""
    pieces, more = [], True
    while more:
        message = await ahead.receive()
        pieces.append(message["body"])
        more = message["more_body"]
    return pieces


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
        assert b"".join(await whole(ahead)) == b"one two three"

    run(talk, part(b"one "), part(b""), part(b"two "), part(b"three", more_body=False))


def test_a_client_that_goes_is_noticed_though_nobody_reads():
    async def talk(ahead, watch, to_read):
        assert await watch

    run(talk, part(b"one"), part(b"two"), GONE)


def test_so_much_is_read_ahead_and_no_more():
    async def talk(ahead, watch, to_read):
        await settle()
        assert to_read.qsize() == 2
        assert len((await ahead.receive())["body"]) == AHEAD
        assert (await ahead.receive())["body"] == b"ab"
        await settle()
        assert to_read.qsize() == 0
        assert await watch

    run(talk, part(bytes(AHEAD)), part(b"ab"), part(b"c"), GONE)


def test_more_is_read_ahead_where_it_is_allowed():
    async def talk(ahead, watch, to_read):
        await settle()
        assert to_read.qsize() == 3
        ahead.allow(2 * AHEAD)
        await settle()
        assert to_read.qsize() == 2
        ahead.allow(0)  # AHEAD always is
        for left in (2, 1):
            assert len((await ahead.receive())["body"]) == AHEAD + 1
            await settle()
            assert to_read.qsize() == left
        await ahead.receive()
        assert await watch

    run(talk, *[part(bytes(AHEAD + 1))] * 3, GONE)


def test_a_client_that_goes_is_noticed_behind_all_that_it_has_sent():
    async def talk(ahead, watch, to_read):
        ahead.allow(8 * AHEAD)
        assert await watch

    run(talk, *[part(bytes(AHEAD))] * 8, GONE)


def test_what_was_read_ahead_is_passed_on_in_pieces():
    async def talk(ahead, watch, to_read):
        ahead.allow(4 * AHEAD)
        await settle()
        assert to_read.qsize() == 0
        # Never all at once, and not byte by byte either.
        assert Counter(map(len, await whole(ahead))) == {AHEAD: 3}

    run(talk, *[part(bytes(AHEAD // 64))] * (3 * 64 - 1), part(bytes(AHEAD // 64), False))


def test_what_is_dropped_is_read_on():
    async def talk(ahead, watch, to_read):
        await settle()
        ahead.drop()
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
