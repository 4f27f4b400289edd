"""The page in a browser: several photos, other formats and transparency."""

from io import BytesIO

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import expect

from tests.server.page.conftest import answered, in_browser, lane
from tests.server.page.test_answers import centres
from tests.test_packaging import SAMPLES


def upload(name: str, picture: Image.Image, **options: object) -> dict:
    """A file as the browser is given it."""
    file = BytesIO()
    picture.save(file, **options)
    kind = f"image/{name.rpartition('.')[2]}"
    return {"name": name, "mimeType": kind, "buffer": file.getvalue()}


@in_browser
def test_several_photos_are_kept_and_one_is_in_use(page):
    pictures = [SAMPLES / "cat.jpg", SAMPLES / "shuttle.jpg"]
    page.locator("#file").set_input_files(pictures)
    thumbnails = page.locator(".samples [src^='blob:']")
    expect(thumbnails).to_have_count(2)
    expect(lane(page).locator(".call")).to_contain_text('@"cat.jpg')
    page.get_by_role("button", name="shuttle.jpg").click()
    expect(lane(page).locator(".call")).to_contain_text('@"shuttle.jpg')
    expect(page.locator(".samples [aria-pressed=true] img")).to_have_attribute("alt", "shuttle.jpg")
    expect(page.locator(".samples [aria-pressed=true]")).to_have_count(1)

    grey = Image.new("RGB", (8, 8), "grey")
    page.locator("#file").set_input_files(
        [upload(f"{index}.png", grey, format="png") for index in range(11)]
    )
    expect(thumbnails).to_have_count(12)  # the oldest went
    expect(page.get_by_role("button", name="cat.jpg")).to_have_count(0)
    expect(page.get_by_role("button", name="shuttle.jpg")).to_have_count(1)


@in_browser
@pytest.mark.parametrize("kind", ["gif", "avif"])
def test_what_only_the_browser_can_read_is_sent_as_a_jpeg(page, kind):
    with Image.open(SAMPLES / "cat.jpg") as cat:
        page.locator("#file").set_input_files(upload(f"my.{kind}", cat, format=kind))
    expect(lane(page).locator(".call")).to_contain_text("my.jpg")
    answered(page, 2)
    expect(page.locator("#note")).to_have_text(
        f"my.{kind} is sent as a JPEG, which the server can read."
    )
    expect(lane(page).get_by_role("alert")).to_be_hidden()
    page.get_by_role("group", name="Sample photos").get_by_role("button").first.click()
    expect(page.locator("#note")).to_be_empty()


@in_browser
def test_transparency_is_shown_as_the_model_sees_it(page):
    pixels = np.zeros((248, 248, 4), np.uint8)
    pixels[:, :124] = (200, 100, 0, 128)  # the model sees no alpha: all of the colour
    page.locator("#file").set_input_files(
        upload("clear.png", Image.fromarray(pixels, "RGBA"), format="png")
    )
    expect(lane(page).locator(".call")).to_contain_text("clear.png")
    page.get_by_label("Photo", exact=True).check()
    seen = centres(page).reshape(14, 14, 3)
    assert np.abs(seen[:, :6] - (200, 100, 0)).max() <= 3
    assert seen[:, 8:].max() <= 1
