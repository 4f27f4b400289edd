"""The page in a browser: its address leads to what it shows."""

from playwright.sync_api import expect

from tests.server.page.conftest import answered, in_browser, lane, shown, slide


@in_browser
def test_the_address_leads_back_to_what_is_shown(page, address):
    page.get_by_role("group", name="Sample photos").get_by_role("button").nth(1).click()
    expect(lane(page).locator(".call")).to_contain_text("shuttle.jpg")
    slide(page, 3)
    lane(page).get_by_label("Repair with the bank").uncheck()
    expect(lane(page).locator(".delta")).to_contain_text("left out")
    before = shown(page)
    there = f"{address}/?rate=3&model={page.locator('#model').input_value()}"
    assert page.url == f"{there}&compensate=false&sample=shuttle"
    page.reload()
    answered(page, 3)
    expect(lane(page).locator(".call")).to_contain_text("shuttle.jpg")
    expect(lane(page).get_by_label("Repair with the bank")).not_to_be_checked()
    assert shown(page) == before

    page.goto(f"{address}/?model=tiny&rate=auto")
    answered(page, "auto")
    expect(page.locator("#model")).to_have_value("tiny")
    expect(lane(page).get_by_label("Auto")).to_be_checked()


@in_browser
def test_an_address_that_leads_nowhere_is_no_error(page, address):
    for wrong in ("model=none&ladder=none&sample=../cat", "rate=17", "rate=-1", "rate=&sample="):
        page.goto(f"{address}/?{wrong}")
        answered(page, 2)
        expect(lane(page).get_by_role("alert")).to_be_hidden()
        expect(page.locator(".samples [aria-pressed=true] img")).to_have_attribute(
            "src", "page/samples/cup.jpg"
        )
