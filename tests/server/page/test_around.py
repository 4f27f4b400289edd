"""The page in a browser: what was measured, screens, keys, and what the server refuses."""

import json
import re

import pytest
from playwright.sync_api import Route, expect

from tests.server.page.conftest import MODEL, ROOT, answered, in_browser, lane, slide


@in_browser
def test_what_was_measured_is_drawn(page):
    config = json.loads((MODEL / "config.json").read_text())
    rows = {row["target"]: row for row in config["evaluation"]["rows"] if row["source"] == 0}
    slide(page, 3)
    plain, bank = (f"{rows[3][kind]['top1']:.1f} %" for kind in ("plain", "bank"))
    words = page.locator(".accuracy-words")
    expect(words).to_have_text(f"Rate 3: {plain} plain, {bank} with the bank.")
    expect(page.locator(".accuracy .point.bank")).to_have_count(len(rows))
    expect(page.locator(".latency-words")).to_contain_text("Rate 3: ")
    # The axis has no more room than values need.
    levels = [float(text) for text in page.locator(".accuracy .end").all_text_contents()]
    shown = [rows[rate][kind]["top1"] for rate in (1, 2, 3, 4) for kind in ("plain", "bank")]
    assert min(levels) > min(shown) - 1
    assert max(levels) < max(shown) + 1
    page.get_by_label("Agreement").check()
    agreement = rows[3]["bank"]["agreement"]
    expect(words).to_contain_text(f"{agreement:.1f} % with the bank")
    page.get_by_label("Top-1").check()
    expect(page.locator(".accuracy .mark")).to_have_count(1)

    page.get_by_role("button", name="Measure every rate").click()
    expect(page.get_by_role("button", name="Measure every rate")).to_be_visible()
    expect(page.locator(".latency .point.bank")).to_have_count(5)

    page.locator("#model").select_option("tiny")
    expect(page.get_by_text("This model has no measured accuracy yet")).to_be_visible()
    answered(page, 3)
    expect(lane(page).locator(".caption")).to_contain_text("64 × 64 pixels, 16 patches")


@in_browser
def test_between_measured_rates_it_says_about(page, address):
    kept = {}

    def without_rate_2(route: Route) -> None:
        answer = route.fetch()
        model = answer.json()
        rows = [row for row in model["evaluation"]["rows"] if row["source"] == 0]
        kept.update({row["target"]: row for row in rows})
        model["evaluation"]["rows"] = [row for row in rows if row["target"] != 2]
        route.fulfill(response=answer, json=model)

    page.route("**/v1/models/imagenet", without_rate_2)
    page.reload()
    answered(page, 2)
    plain, bank = (
        f"{(kept[1][kind]['top1'] + kept[3][kind]['top1']) / 2:.1f} %" for kind in ("plain", "bank")
    )
    expect(page.locator(".accuracy-words")).to_have_text(
        f"Rate 2: about {plain} plain, {bank} with the bank, in between the measured 1 and 3."
    )


@in_browser
def test_what_was_measured_is_shown_for_its_ladder_alone(page):
    def of_another(route: Route) -> None:
        answer = route.fetch()
        model = answer.json()
        model["evaluation"]["ladder"]["digest"] = "0" * 64
        route.fulfill(response=answer, json=model)

    page.route("**/v1/models/imagenet", of_another)
    page.reload()
    answered(page, 2)
    expect(page.get_by_text("This model has no measured accuracy yet")).to_be_visible()


@in_browser
def test_rates_that_are_not_served_are_not_drawn(page):
    def with_a_higher_one(route: Route) -> None:
        answer = route.fetch()
        model = answer.json()
        rows = model["evaluation"]["rows"]
        rows.append({**rows[-1], "source": 0, "target": 99})
        route.fulfill(response=answer, json=model)

    page.route("**/v1/models/imagenet", with_a_higher_one)
    page.reload()
    answered(page, 2)
    expect(page.locator(".accuracy-words")).to_contain_text("Rate 2: ")
    expect(page.locator("#away")).to_be_hidden()


@in_browser
def test_answers_that_were_kept_are_not_counted(page):
    def kept(route: Route) -> None:
        answer = route.fetch()
        told = {**answer.json(), "cached": True, "batch_size": 0}
        route.fulfill(response=answer, json=told)

    page.route("**/v1/classify*", kept)
    slide(page, 3)
    expect(lane(page).locator(".batch")).to_have_text("kept from before")
    expect(page.locator(".latency-words")).to_be_empty()


@in_browser
@pytest.mark.parametrize(
    ("embedding", "said"), [(["tiny"], "patches"), (["tiny", "imagenet"], "No model here")]
)
def test_models_for_embedding_alone_are_left_out(page, embedding, said):
    def of_embedding(route: Route) -> None:
        answer = route.fetch()
        models = answer.json()["models"]
        for model in models:
            if model["name"] in embedding:
                model["kind"] = "embedding"
        route.fulfill(response=answer, json={"models": models})

    page.route("**/v1/models", of_embedding)
    page.reload()
    expect(lane(page).locator(".caption")).to_contain_text(said)
    expect(page.locator("#model option")).to_have_count(2 - len(embedding))
    expect(page.locator("#away")).to_be_hidden()


@in_browser
@pytest.mark.parametrize("width", [320, 390, 800, 1280, 1920])
def test_nothing_is_wider_than_the_screen(page, width):
    page.set_viewport_size({"width": width, "height": 844})
    for comparing in (False, True):
        page.get_by_label("Compare two rates").set_checked(comparing)
        wide = page.evaluate("document.documentElement.scrollWidth")
        assert wide == width
        map_box = lane(page).locator("canvas").bounding_box()
        assert map_box["width"] == pytest.approx(map_box["height"], abs=1)
        assert map_box["width"] > min(300, width / 3)


@in_browser
def test_light_and_dark(page):
    def brightness() -> int:
        colour = page.evaluate("getComputedStyle(document.documentElement).backgroundColor")
        return sum(map(int, re.findall(r"\d+", colour)))

    def wait_for_seam(dark: bool) -> None:
        # The map is drawn again a frame after the page has changed.
        page.wait_for_function(
            """([canvas, dark]) => {
                const { data: [red] } = canvas.getContext("2d")
                    .getImageData(canvas.width - 1, canvas.height - 1, 1, 1);
                return dark ? red < 60 : red > 200;
            }""",
            arg=[lane(page).locator("canvas").element_handle(), dark],
        )

    assert brightness() > 600
    wait_for_seam(dark=False)
    page.emulate_media(color_scheme="dark")
    assert brightness() < 100
    wait_for_seam(dark=True)
    page.get_by_role("button", name="Light or dark").click()
    assert brightness() > 600
    wait_for_seam(dark=False)
    page.reload()
    assert brightness() > 600  # what was chosen is kept


@in_browser
def test_the_keyboard_is_enough(page):
    def tab_to(selector: str) -> None:
        for _ in range(40):
            page.keyboard.press("Tab")
            if page.evaluate("(selector) => document.activeElement.matches(selector)", selector):
                outline = page.evaluate(
                    "getComputedStyle(document.activeElement.closest('.button') ?? "
                    "document.activeElement).outlineStyle"
                )
                assert outline == "solid"
                return
        pytest.fail(f"{selector} cannot be reached")

    tab_to("a[href='#photo']")
    page.keyboard.press("Enter")
    tab_to("#file")
    tab_to(".samples button:nth-of-type(2)")
    page.keyboard.press("Enter")
    expect(lane(page).locator(".call")).to_contain_text("shuttle.jpg")
    tab_to("canvas")
    page.keyboard.press("ArrowUp")
    expect(lane(page).locator(".caption")).to_contain_text("→ 1 token")
    tab_to(".slider")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    answered(page, 4)
    expect(lane(page).locator(".spoken")).to_contain_text("Rate 4: ")
    tab_to(".auto")
    page.keyboard.press("Space")
    answered(page, "auto")


@in_browser
def test_what_the_server_refuses_is_said_in_its_words(page):
    page.locator("#file").set_input_files(ROOT / "pyproject.toml")
    alert = lane(page).get_by_role("alert")
    expect(alert).to_have_text(
        "Unsupported type: the content is not a JPEG, PNG or WebP image. Convert it to JPEG or PNG."
    )
    expect(lane(page).locator(".predictions")).to_be_hidden()
    expect(lane(page).locator(".caption")).to_have_text("This browser cannot show pyproject.toml.")
    expect(page.locator(".samples [aria-pressed=true]")).to_have_count(0)
    page.get_by_role("group", name="Sample photos").get_by_role("button").first.click()
    expect(alert).to_be_hidden()
    expect(lane(page).locator(".predictions")).to_be_visible()


@in_browser
def test_a_key_is_asked_for_and_sent(page):
    def guard(route: Route) -> None:
        if route.request.headers.get("x-api-key") == "a key":
            route.continue_()
        else:
            route.fulfill(status=401, json={"title": "Unauthorized", "detail": "a key is needed"})

    page.route("**/v1/classify*", guard)
    lane(page).get_by_role("slider").fill("3")
    page.get_by_label("This server needs an API key").fill("a key")
    page.keyboard.press("Enter")
    answered(page, 3)
    expect(lane(page).locator(".call")).to_contain_text('-H "X-API-Key: $KEY"')


@in_browser
def test_the_load_is_shown(page):
    expect(page.locator(".live .queued .now")).to_have_text("0 of 256")
    expect(page.locator(".live .speed polyline")).to_be_attached()
    expect(page.locator(".live .auto .now")).to_have_text(re.compile(r"^\d+$"))
