"""The clients ask a real server for the class of every pixel."""

import asyncio
from collections.abc import Iterator
from io import BytesIO

import httpx
import numpy as np
import pytest
from PIL import Image

from server.app import create_app
from server.client import AsyncClient, Client, SegmentedImage
from server.schemas import Problem
from tests.server.conftest import listening, picture, png
from tests.server.segmenters import streets

PHOTO = picture(0, 80, 50)


@pytest.fixture(scope="module")
def address(settings, tiny, tmp_path_factory) -> Iterator[str]:
    segmenter = streets(tiny, tmp_path_factory.mktemp("tasks"))
    with listening(create_app(settings.model_copy(update={"models": (segmenter,)}))) as address:
        yield f"http://{address}"


def test_every_pixel_has_the_class_that_the_server_says(address):
    with Client(address) as client:
        answer = client.segment(PHOTO, rate=3, compensate=False)
        palette = client.model("streets").palette
    assert (answer.model, answer.rate, answer.compensate) == ("streets", 3, False)
    asked = {"rate": 3, "compensate": False, "format": "png"}
    told = httpx.post(f"{address}/v1/segment", params=asked, content=png(PHOTO)).content
    with Image.open(BytesIO(told)) as image:
        assert np.array_equal(answer.class_map, np.asarray(image))
    assert (answer.class_map.shape, answer.class_map.dtype) == ((50, 80), np.uint8)
    shares = {each.index: each.share for each in answer.classes}
    assert shares == {
        index: pytest.approx((answer.class_map == index).mean(), abs=1e-6) for index in shares
    }
    assert len(palette) == 3


def test_several_images_are_answered_by_both_clients(address):
    async def ask() -> list[SegmentedImage | Problem]:
        async with AsyncClient(address) as client:
            one = await client.segment(PHOTO, rate=1)
            return [one, *await client.segment_many([PHOTO, b"no image"], rate=1)]

    one, first, second = asyncio.run(ask())
    assert isinstance(one, SegmentedImage)
    assert isinstance(first, SegmentedImage)
    assert np.array_equal(one.class_map, first.class_map)
    assert isinstance(second, Problem)
    assert second.status == 415
    with Client(address) as client:
        again, _ = client.segment_many([PHOTO, b"no image"], rate=1)
    assert again.runs == first.runs
