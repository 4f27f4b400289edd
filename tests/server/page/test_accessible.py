"""The page in a browser: axe-core finds nothing that keeps somebody out."""

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import expect

from tests.server.page.conftest import answered, in_browser, lane


def violations(page) -> list[str]:
    """What axe-core finds wrong, a line each."""
    found = Axe().run(page).response["violations"]
    return [f"{each['id']}: {node['target']}" for each in found for node in each["nodes"]]


@in_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_an_answer(page, scheme, width):
    page.emulate_media(color_scheme=scheme)
    page.set_viewport_size({"width": width, "height": 844})
    assert violations(page) == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.get_by_label("Compare two rates").check()
    answered(page, 0, "B")
    assert violations(page) == []


@in_browser
def test_a_photo_that_cannot_be_read_and_a_server_that_is_gone(page, tmp_path):
    (tmp_path / "notes.txt").write_text("no picture")
    page.locator("#file").set_input_files(tmp_path / "notes.txt")
    expect(lane(page).get_by_role("alert")).to_be_visible()
    assert violations(page) == []
    page.route("**/v1/**", lambda route: route.abort())
    lane(page).get_by_role("slider").fill("4")
    expect(page.get_by_role("alert").first).to_be_visible()
    assert violations(page) == []
