"""The lines of a stream, however its bytes arrive."""

import asyncio

import httpx
import pytest

from server.client import AsyncClient, Client
from tests.server.client.test_client import UNUSUAL, Answers


@pytest.mark.parametrize("size", [1, 7, 10_000])
@pytest.mark.parametrize("end", ["", "\n"])
def test_lines_come_in_any_pieces(photo, size, end):
    said = [f'{{"index":{n},"name":"{n}{UNUSUAL}","done":1,"total":null}}' for n in range(2)]
    content = ("\n".join(said) + end).encode()
    pieces = [content[start : start + size] for start in range(0, len(content), size)]

    async def asynchronous():
        for piece in pieces:
            yield piece

    async def use():
        answers = Answers(httpx.Response(200, content=asynchronous()))
        client = AsyncClient(transport=httpx.MockTransport(answers.asynchronous))
        return [line async for line in client.stream_batch([photo] * 2)]

    answers = Answers(httpx.Response(200, content=iter(pieces)))
    blocking = Client(transport=httpx.MockTransport(answers)).stream_batch([photo] * 2)
    for lines in (list(blocking), asyncio.run(use())):
        assert [line.name for line in lines] == [f"0{UNUSUAL}", f"1{UNUSUAL}"]
