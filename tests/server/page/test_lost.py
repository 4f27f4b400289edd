"""The page in a browser: while the server is not there yet, is away, or is full."""

from playwright.sync_api import Route, expect

from tests.server.page.conftest import answered, in_browser, lane, slide


@in_browser
def test_until_the_server_answers_the_page_says_that_it_waits(page):
    waiting: list[Route] = []

    def hold(route: Route) -> None:
        waiting.append(route)

    page.route("**/v1/**", hold)
    page.reload()
    expect(lane(page).locator(".caption")).to_have_text("Waiting for the server …")
    for part in (".control", ".facts", ".terminal"):
        expect(lane(page).locator(part)).to_be_hidden()
    expect(page.locator(".evidence")).to_be_hidden()
    expect(lane(page).locator(".predictions")).to_be_visible()  # where they will be
    for route in waiting:
        route.continue_()
    page.unroute("**/v1/**")
    answered(page, 2)
    for part in (".control", ".facts", ".terminal"):
        expect(lane(page).locator(part)).to_be_visible()
    expect(page.locator(".evidence")).to_be_visible()


@in_browser
def test_the_page_outlives_a_restart(page):
    page.route("**/v1/**", lambda route: route.abort())
    lane(page).get_by_role("slider").fill("3")
    expect(page.locator("#away")).to_be_visible()
    expect(lane(page).get_by_role("alert")).to_contain_text("The server does not answer")
    # No answer at another rate than the one that is shown.
    for part in (".predictions", ".facts", ".terminal"):
        expect(lane(page).locator(part)).to_be_hidden()
    expect(lane(page).locator(".caption")).not_to_contain_text("groups")
    page.unroute("**/v1/**")
    answered(page, 3)
    expect(page.locator("#away")).to_be_hidden()
    expect(lane(page).get_by_role("alert")).to_be_hidden()


@in_browser
def test_a_loss_while_the_status_is_asked_for_is_not_forgotten(page):
    waiting: list[Route] = []

    def hold(route: Route) -> None:
        waiting.append(route)

    with page.expect_request("**/v1/status"):
        page.route("**/v1/status", hold)
    page.route("**/v1/classify*", lambda route: route.abort(), times=1)
    lane(page).get_by_role("slider").fill("3")
    expect(lane(page).get_by_role("alert")).to_contain_text("The server does not answer")
    for route in waiting:
        route.continue_()
    page.unroute("**/v1/status")
    answered(page, 3)


@in_browser
def test_it_waits_while_the_server_is_full(page):
    def refuse(route: Route) -> None:
        body = {"title": "Queue full", "detail": "256 images are waiting"}
        route.fulfill(status=503, headers={"Retry-After": "1"}, json=body)

    page.route("**/v1/classify*", refuse, times=1)
    lane(page).get_by_role("slider").fill("3")
    expect(lane(page).get_by_role("alert")).to_have_text(
        "Queue full: 256 images are waiting – asking again in 1 s"
    )
    answered(page, 3)
    expect(lane(page).get_by_role("alert")).to_be_hidden()


@in_browser
def test_without_the_server_a_sample_is_not_said_to_be_in_use(page):
    page.route("**/v1/**", lambda route: route.abort())
    page.route("**/page/samples/*", lambda route: route.abort())
    samples = page.get_by_role("group", name="Sample photos").get_by_role("button")
    samples.nth(3).click()
    expect(page.locator("#away")).to_be_visible()
    expect(samples.nth(0)).to_have_attribute("aria-pressed", "true")
    expect(samples.nth(3)).to_have_attribute("aria-pressed", "false")
    page.unroute_all()
    expect(page.locator("#away")).to_be_hidden()
    samples.nth(3).click()
    expect(lane(page).locator(".call")).to_contain_text("cat.jpg")
    expect(samples.nth(3)).to_have_attribute("aria-pressed", "true")


@in_browser
def test_a_verdict_goes_with_its_answers(page):
    page.get_by_label("Compare two rates").check()
    answered(page, 0, "B")
    expect(page.locator("#verdict")).to_contain_text("Both say espresso.")
    page.route("**/v1/**", lambda route: route.abort())
    lane(page).get_by_role("slider").fill("3")
    expect(page.locator("#verdict")).to_be_empty()
    page.unroute("**/v1/**")
    slide(page, 3)
    expect(page.locator("#verdict")).to_contain_text("Both say espresso.")
