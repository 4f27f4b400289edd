import math

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform

from server.models.cropping import transformed
from server.models.pictures import prepare
from server.settings import Settings
from tests.server.conftest import png


def noise(width: int, height: int) -> Image.Image:
    values = np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def transform(size=(3, 224, 224), **arguments):
    """A transform that leaves the pixels as they are: whole numbers from 0 to 255."""
    arguments = {"interpolation": "bicubic", "crop_pct": 0.9, "normalize": False, **arguments}
    return create_transform(size, **arguments)


@pytest.fixture
def resized(monkeypatch):
    """The sizes that Pillow resizes pictures to."""
    sizes = []
    original = Image.Image.resize

    def resize(self, size, *args, **kwargs):
        sizes.append(tuple(size))
        return original(self, size, *args, **kwargs)

    monkeypatch.setattr(Image.Image, "resize", resize)
    return sizes


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"interpolation": "bilinear"},
        {"interpolation": "lanczos"},
        {"crop_pct": 1.0},
        {"size": (3, 64, 64), "crop_pct": 0.875},
        {"size": (3, 96, 64)},
        {"size": (3, 64, 96)},
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "size", [(1, 100), (100, 1), (2, 199), (613, 7), (20, 401), (61, 4099), (60, 901), (991, 62)]
)
def test_a_long_picture_comes_out_as_it_would_whole(size, arguments, resized):
    steps, image = transform(**arguments), noise(*size)
    whole = steps(image).int()
    del resized[:]
    middle = transformed(image, steps).int()
    difference = (middle - whole).abs()
    assert difference.max() <= 1
    assert (difference > 0).float().mean() < 0.005
    kept = math.prod(arguments.get("size", (3, 224, 224))[1:])
    assert all(math.prod(made) < 2 * kept for made in resized)


@pytest.mark.parametrize("size", [(1, 100), (100, 1), (31, 3100), (1240, 124)])
def test_where_the_places_are_exact_not_a_bit_differs(size):
    steps, image = transform(), noise(*size)
    assert torch.equal(transformed(image, steps), steps(image))


def test_an_ordinary_picture_goes_through_the_transform_as_it_is(resized):
    steps = transform()
    for size in ((80, 64), (64, 80), (60, 60), (7 * 60, 60), (496, 9000)):
        image = noise(*size)
        del resized[:]
        middle = transformed(image, steps)
        assert resized == [tuple(int(248 * side / min(size)) for side in size)]
        assert torch.equal(middle, steps(image))


@pytest.mark.parametrize(
    "steps",
    [transform(crop_mode="squash"), transform(crop_mode="border"), lambda image: image.size],
    ids=["squash", "border", "another"],
)
def test_where_nothing_is_thrown_away_nothing_changes(steps):
    image = noise(3, 300)
    expected, came = steps(image), transformed(image, steps)
    assert torch.equal(came, expected) if isinstance(expected, torch.Tensor) else came == expected


@pytest.mark.parametrize("size", [(2, 200), (200, 2)])
def test_a_long_upload_makes_few_pixels(size, served, settings, resized):
    image = prepare(png(noise(*size)), served, settings)
    assert max(math.prod(made) for made in resized) < 2 * 74**2
    assert torch.equal(image, served.transform(noise(*size)))
    assert max(math.prod(made) for made in resized) > 70 * 74**2


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("size", [(500, 375), (375, 500), (226, 224), (100, 60), (1600, 1200)])
def test_torch_resizes_as_pillow_does_but_for_rounding(size, interpolation, resized):
    steps, image = transform(interpolation=interpolation), noise(*size)
    whole = steps(image).int()
    del resized[:]
    fast = transformed(image, steps, fast=True).int()
    assert not resized
    difference = (fast - whole).abs()
    assert difference.max() <= 2
    assert difference.count_nonzero() < 0.01 * difference.numel()


@pytest.mark.parametrize("arguments", [{"interpolation": "lanczos"}, {"crop_mode": "squash"}])
def test_what_torch_cannot_resize_alike_is_left_to_pillow(arguments):
    steps, image = transform(**arguments), noise(500, 375)
    assert torch.equal(transformed(image, steps, fast=True), steps(image))


def test_a_server_resizes_as_its_settings_say(served):
    data, sure = png(noise(300, 200)), Settings()
    fast = prepare(data, served, sure.model_copy(update={"fast_resize": True}))
    assert not torch.equal(fast, prepare(data, served, sure))
    torch.testing.assert_close(fast, prepare(data, served, sure), atol=0.03, rtol=0)
