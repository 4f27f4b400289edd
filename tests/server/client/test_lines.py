"""The lines of a stream, however its bytes arrive."""

import asyncio

import httpx
import pytest

from server.client import AsyncClient, Client, ToComServerError
from tests.server.client.test_client import LINE, UNUSUAL, Answers


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


def test_a_stream_without_a_line_for_each_image_is_lost(photo):
    texts = (LINE % 0 + LINE % 1, LINE % 0)
    both = {"match": "the answer ended after 1 of 2 images"}
    answers = Answers(*(httpx.Response(200, text=text) for text in texts))
    stream = Client(transport=httpx.MockTransport(answers)).stream_batch([photo] * 4, per_request=2)
    assert [next(stream).index for _ in range(3)] == [0, 1, 2]
    with pytest.raises(httpx.TransportError, **both):
        next(stream)

    async def use():
        answers = Answers(httpx.Response(200, text=LINE % 0))
        client = AsyncClient(transport=httpx.MockTransport(answers.asynchronous))
        return [line async for line in client.stream_batch(iter([photo] * 2))]

    with pytest.raises(httpx.TransportError, **both):
        asyncio.run(use())


@pytest.mark.parametrize("said", [b"<html>Sign in</html>", b"\n", b"\xff\n"])
def test_a_success_of_something_else_is_not_taken_for_an_answer(photo, said):
    def answering() -> httpx.MockTransport:
        answers = Answers(*(httpx.Response(200, content=said) for _ in range(2)))
        return httpx.MockTransport(answers.asynchronous if asynchronous else answers)

    async def use():
        client = AsyncClient(transport=answering())
        with pytest.raises(ToComServerError, match="200 OK: not an answer of ToCom Serve: '"):
            await client.models()
        with pytest.raises(ToComServerError, match="200 OK: not an answer of ToCom Serve: '"):
            await anext(client.stream_batch([photo]))

    asynchronous = False
    client = Client(transport=answering())
    with pytest.raises(ToComServerError, match="200 OK: not an answer of ToCom Serve: '"):
        client.models()
    with pytest.raises(ToComServerError, match="200 OK: not an answer of ToCom Serve: '"):
        next(client.stream_batch([photo]))
    asynchronous = True
    asyncio.run(use())
