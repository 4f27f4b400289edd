"""The page in a browser: what it shows of a photograph at a rate."""

import re
from io import BytesIO

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Page, expect

from tests.server.page.conftest import answered, ask, in_browser, lane, read, shown, slide
from tests.test_packaging import SAMPLES


@in_browser
def test_a_chosen_photo_is_answered_and_another_rate_changes_the_answer(page, address):
    cat = SAMPLES / "cat.jpg"
    page.locator("#file").set_input_files(cat)
    expect(lane(page).locator(".call")).to_contain_text("cat.jpg")
    answered(page, 2)
    at_2 = shown(page)
    assert at_2 == read(ask(address, cat.read_bytes(), rate=2))
    expect(lane(page).locator(".tokens")).to_have_text("197 → 67")

    slide(page, 4)
    assert shown(page) == read(ask(address, cat.read_bytes(), rate=4))
    assert shown(page) != at_2
    expect(lane(page).locator(".tokens")).to_have_text("197 → 20")
    expect(lane(page).locator(".macs")).to_have_text("0.627 GMACs")
    expect(lane(page).locator(".ratio")).to_have_text("50 % of the stock model")

    lane(page).get_by_label("Repair with the bank").uncheck()
    expect(lane(page).locator(".delta")).to_contain_text("left out")
    assert shown(page) == read(ask(address, cat.read_bytes(), rate=4, compensate=False))


@in_browser
@pytest.mark.parametrize("way", ["drop", "paste"])
def test_a_photo_may_be_dropped_or_pasted(page, address, way):
    page.evaluate(
        """async (way) => {
            const data = new DataTransfer();
            const photo = await (await fetch("page/samples/shuttle.jpg")).blob();
            data.items.add(new File([photo], "mine.jpg", { type: "image/jpeg" }));
            const bubbles = { bubbles: true, cancelable: true };
            document.body.dispatchEvent(way === "drop"
                ? new DragEvent("drop", { ...bubbles, dataTransfer: data })
                : new ClipboardEvent("paste", { ...bubbles, clipboardData: data }));
        }""",
        way,
    )
    expect(lane(page).locator(".call")).to_contain_text("mine.jpg")
    answered(page, 2)
    assert shown(page) == read(ask(address, (SAMPLES / "shuttle.jpg").read_bytes(), rate=2))


@in_browser
@pytest.mark.parametrize("name", ["cup.jpg", "shuttle.jpg"])  # wide and upright
def test_merged_patches_have_the_mean_colour_of_what_the_model_sees(page, address, name):
    page.get_by_role("group", name="Sample photos").locator(f"[src$='{name}']").click()
    expect(lane(page).locator(".call")).to_contain_text(name)
    slide(page, 4)
    photo = (SAMPLES / name).read_bytes()
    merge_map = ask(address, photo, rate=4, merge_map=True)["merge_map"]
    tokens = np.array(merge_map["tokens"])
    means = patch_means(photo)
    expected = np.stack([means[tokens == token].mean(axis=0) for token in tokens])
    merged = np.array([(tokens == token).sum() > 1 for token in tokens])
    assert merged.sum() > 100  # otherwise little was shown
    assert np.abs(centres(page) - expected)[merged].max() <= 4

    page.get_by_label("Outlines").check()
    assert np.abs(centres(page) - expected)[merged].max() > 20  # the photo again


def patch_means(photo: bytes) -> np.ndarray:
    """The mean colour of each of the 14 x 14 patches that the bundled model sees: [196, 3]."""
    image = Image.open(BytesIO(photo)).convert("RGB")
    scale = 248 / min(image.size)  # 224 / 0.9
    width, height = round(image.width * scale), round(image.height * scale)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - 224) // 2, (height - 224) // 2
    pixels = np.asarray(image.crop((left, top, left + 224, top + 224)), dtype=float)
    return pixels.reshape(14, 16, 14, 16, 3).mean(axis=(1, 3)).reshape(196, 3)


def centres(page: Page) -> np.ndarray:
    """The colour in the middle of each patch on the canvas: [196, 3]."""
    return np.array(
        lane(page)
        .locator("canvas")
        .evaluate(
            """(canvas) => [...Array(196).keys()].map((patch) => {
                const x = ((patch % 14) + 0.5) * canvas.width / 14;
                const y = (Math.floor(patch / 14) + 0.5) * canvas.height / 14;
                return [...canvas.getContext("2d").getImageData(x, y, 1, 1).data].slice(0, 3);
            })"""
        )
    )


@in_browser
def test_a_group_says_how_many_patches_it_is(page, address):
    slide(page, 3)
    photo = (SAMPLES / "cup.jpg").read_bytes()
    tokens = ask(address, photo, rate=3, merge_map=True)["merge_map"]["tokens"]
    canvas, caption = lane(page).locator("canvas"), lane(page).locator(".caption")
    expect(caption).to_have_text(re.compile(r"196 patches in 47 groups"))
    before = centres(page)

    box = canvas.bounding_box()
    canvas.hover(position={"x": box["width"] * 2.5 / 14, "y": box["height"] * 9.5 / 14})
    expect(caption).to_have_text(said(tokens, 9 * 14 + 2))
    changed = np.abs(centres(page) - before).max(axis=1) > 0
    others = np.array(tokens) != tokens[9 * 14 + 2]
    assert changed[others].all()  # all others fade

    page.mouse.move(0, 0)
    expect(caption).to_contain_text("47 groups")
    canvas.focus()
    page.keyboard.press("ArrowDown")  # begins in the middle
    expect(caption).to_have_text(said(tokens, 7 * 14 + 7))
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowLeft")
    expect(caption).to_have_text(said(tokens, 8 * 14 + 6))
    expect(lane(page).locator(".spoken")).to_have_text(said(tokens, 8 * 14 + 6))
    page.keyboard.press("Escape")
    expect(caption).to_contain_text("47 groups")


def said(tokens: list[int], patch: int) -> str:
    count = tokens.count(tokens[patch])
    return f"{count} {'patch' if count == 1 else 'patches'} → 1 token"


@in_browser
def test_two_rates_are_compared(page, address):
    page.get_by_label("Compare two rates").check()
    answered(page, 0, "B")
    slide(page, 4)
    photo = (SAMPLES / "cup.jpg").read_bytes()
    dear, cheap = (ask(address, photo, rate=rate) for rate in (0, 4))
    assert (shown(page), shown(page, "B")) == (read(cheap), read(dear))
    verdict = page.locator("#verdict")
    expect(verdict).to_contain_text("Both say espresso. A takes 50 % of B’s compute")
    change = 100 * (cheap["predictions"][0]["score"] - dear["predictions"][0]["score"])
    expect(lane(page).locator(".note").first).to_have_text(f"{change:+.1f}".replace("-", "−"))
    ranks = [[each["index"] for each in answer["predictions"]] for answer in (cheap, dear)]
    differ = sum(a != b for a, b in zip(*ranks, strict=True))
    expect(lane(page).locator(".differs")).to_have_count(differ)
    marks = page.locator(".latency .mark")
    assert [mark.get_attribute("class") for mark in marks.all()] == ["mark A", "mark B"]

    page.get_by_label("Compare two rates").uncheck()
    expect(lane(page, "B")).to_be_hidden()
    expect(lane(page).locator(".note").first).to_be_hidden()
    expect(page.locator("#verdict")).to_be_empty()


@in_browser
def test_the_server_chooses_the_rate(page):
    lane(page).get_by_label("Auto").check()
    answered(page, "auto")
    expect(lane(page).locator(".reason")).to_have_text(re.compile(r"^Auto \(\w+\) chose .+ answer"))
    lane(page).get_by_role("slider").fill("1")
    answered(page, 1)
    expect(lane(page).get_by_label("Auto")).not_to_be_checked()
    expect(lane(page).locator(".reason")).to_be_empty()
