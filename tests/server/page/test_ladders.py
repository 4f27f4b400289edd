"""The page in a browser, with a model on several ladders."""

import re
from collections.abc import Iterator

import pytest
from playwright.sync_api import expect

from server.app import create_app
from server.settings import BUNDLED_MODEL, Settings
from tests.server.conftest import listening
from tests.server.ladders import on_ladders
from tests.server.page.conftest import answered, ask, in_browser, lane, read, shown, slide
from tests.test_packaging import SAMPLES


@pytest.fixture(scope="module")
def address(tiny, tmp_path_factory) -> Iterator[str]:
    """A server of the bundled model and of a tiny one on ladders."""
    several = on_ladders(tiny, tmp_path_factory.mktemp("ladders"), "tome", "uneven", "rings")
    settings = Settings(models=(BUNDLED_MODEL, several), device="cpu", max_batch=1, max_graphs=0)
    with listening(create_app(settings)) as address:
        yield f"http://{address}"


@in_browser
def test_where_a_model_has_several_ladders_one_is_chosen(page, address):
    expect(lane(page).locator(".ladders")).to_be_hidden()
    expect(lane(page).locator(".budget")).to_have_text("budget=0.74 asks for it")
    cup = (SAMPLES / "cup.jpg").read_bytes()
    page.locator("#model").select_option("tiny")
    answered(page, 2)
    lane(page).get_by_label("Ladder").select_option("rings")
    answered(page, 2)
    expect(lane(page).locator(".call")).to_contain_text("ladder=rings")
    expect(lane(page).locator(".rate-words")).to_have_text("of 2, 50 % of the multiply-adds")
    there = ask(address, cup, model="tiny", ladder="rings", rate=2)
    assert shown(page) == read(there)
    expect(lane(page).locator(".tokens")).to_have_text("17 → 5")
    expect(lane(page).get_by_label("Repair with the bank")).to_be_disabled()
    budget = re.match(r"budget=(\S+) asks", lane(page).locator(".budget").inner_text())
    assert ask(address, cup, model="tiny", ladder="rings", budget=budget[1])["rate"] == 2
    slide(page, 0)
    expect(lane(page).locator(".rate-words")).to_have_text("of 2, the stock model")
    expect(lane(page).locator(".caption")).not_to_contain_text("dropped")


@in_browser
def test_an_address_may_name_a_ladder(page, address):
    page.goto(f"{address}/?model=tiny&ladder=uneven&rate=1")
    answered(page, 1)
    expect(lane(page).get_by_label("Ladder")).to_have_value("uneven")
    assert "ladder=uneven" in page.url
    expect(lane(page).locator(".rate-words")).to_have_text(
        re.compile(r"^of 3, \d\d % of the multi")
    )
    expect(lane(page).locator(".ticks span")).to_have_text(["0", "1", "2", "3"])


@in_browser
def test_what_a_ladder_says_of_itself_is_drawn(page, address):
    page.goto(f"{address}/?model=tiny&ladder=uneven&rate=1")
    answered(page, 1)
    words = page.locator(".accuracy-words")
    expect(words).to_have_text("Rate 1: about 87.5 % plain, in between the measured 0 and 2.")
    expect(page.locator(".measured-on")).to_have_text("As the ladder uneven says.")
    expect(page.locator(".accuracy .point")).to_have_count(2)
    expect(page.get_by_label("Top-1")).to_be_disabled()  # it has none for rate 0
    slide(page, 3)
    expect(words).to_have_text("Rate 3: not measured.")
    lane(page).get_by_label("Ladder").select_option("tome")
    expect(page.get_by_text("This model has no measured accuracy yet")).to_be_visible()


@in_browser
def test_dropped_patches_are_dimmed(page):
    page.locator("#model").select_option("tiny")
    answered(page, 2)
    lane(page).get_by_label("Ladder").select_option("rings")
    answered(page, 2)
    caption, canvas = lane(page).locator(".caption"), lane(page).locator("canvas")
    expect(caption).to_contain_text("16 patches, 12 dropped")
    groups = brightness(canvas)
    page.get_by_label("Photo", exact=True).check()
    photo = brightness(canvas)
    # The page behind is light: what is dimmed comes near to it, what is there stays as it is.
    corner, centre = (0, 5)
    assert groups[corner] > photo[corner] + 20
    assert abs(groups[centre] - photo[centre]) <= 1
    canvas.hover(position={"x": 5, "y": 5})
    expect(caption).to_have_text("12 patches dropped")


def brightness(canvas) -> list[float]:
    """How light the middle of each of 4 x 4 patches is, 0..255."""
    return canvas.evaluate(
        """(canvas) => [...Array(16).keys()].map((patch) => {
            const x = ((patch % 4) + 0.5) * canvas.width / 4;
            const y = (Math.floor(patch / 4) + 0.5) * canvas.height / 4;
            const pixel = [...canvas.getContext("2d").getImageData(x, y, 1, 1).data];
            return (pixel[0] + pixel[1] + pixel[2]) / 3;
        })"""
    )
