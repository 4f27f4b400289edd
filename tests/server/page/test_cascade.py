"""The page in a browser: photos that decide their own compute."""

import re

from playwright.sync_api import expect

from tests.server.page.conftest import answered, ask, in_browser, lane, read, shown, slide
from tests.test_packaging import SAMPLES

CUP = (SAMPLES / "cup.jpg").read_bytes()


@in_browser
def test_a_cascade_is_asked_for_and_says_what_ran(page, address):
    decides = lane(page).get_by_label("The photo decides")
    reason = lane(page).locator(".reason")
    lane(page).get_by_label("Auto").check()
    answered(page, "auto")
    points = decides.locator("option").all()[1:]
    assert points
    for point in points:
        agreement = point.get_attribute("value")
        decides.select_option(agreement)
        expect(lane(page).locator(".call")).to_contain_text(f"rate=cascade&agreement={agreement}&")
        there = ask(address, CUP, rate="cascade", agreement=agreement)
        ran = ", then ".join(map(str, there["rates"]))
        expect(reason).to_have_text(re.compile(f"^Ran at rate {ran}: .*enough.*\\.$"))
        assert shown(page) == read(there)
        gmacs = float(lane(page).locator(".macs").inner_text().removesuffix(" GMACs"))
        assert abs(gmacs - there["macs"] / 1e9) < 0.01
        share = f"{100 * there['macs_ratio']:.0f} % of the stock model"
        expect(lane(page).locator(".ratio")).to_have_text(share)
    expect(lane(page).get_by_label("Auto")).not_to_be_checked()
    slide(page, 3)
    expect(decides).to_have_value("")
    expect(reason).to_be_empty()


@in_browser
def test_an_address_may_ask_for_one(page, address):
    decides = lane(page).get_by_label("The photo decides")
    agreement = decides.locator("option").nth(1).get_attribute("value")
    wanted = f"{address}/?rate=cascade&agreement={agreement}&model=imagenet&sample=cat"
    page.goto(wanted)
    expect(lane(page).locator(".reason")).to_contain_text("Ran at rate")
    expect(decides).to_have_value(agreement)
    assert page.url == wanted
    page.goto(f"{address}/?rate=cascade&agreement=none&model=imagenet")
    answered(page, 2)
    expect(decides).to_have_value("")


@in_browser
def test_a_model_without_one_loads_and_shows_nothing_of_it(page, address):
    page.locator("#model").select_option("tiny")
    expect(lane(page).locator(".call")).to_contain_text("model=tiny")
    expect(lane(page).get_by_label("The photo decides")).to_be_hidden()
    sent = []
    page.on("request", lambda request: sent.append(request.url))
    page.goto(f"{address}/?model=tiny")
    answered(page, 3)
    assert any(url.endswith("/lane.js") for url in sent)
    assert not any(url.endswith("/cascade.js") for url in sent)
