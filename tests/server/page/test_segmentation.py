"""The page in a browser, with a model that gives each pixel a class."""

import json
import subprocess
from collections.abc import Iterator

import httpx
import numpy as np
import pytest
from playwright.sync_api import Locator, Page, expect

from server.app import create_app
from server.settings import BUNDLED_MODEL, Settings
from tests.adapters.segmentation.test_task import COLOURS
from tests.server.conftest import MAX_RATE, listening
from tests.server.page.conftest import answered, in_browser, lane, shown, slide
from tests.server.page.test_accessible import violations
from tests.server.segmenters import streets
from tests.test_packaging import SAMPLES


@pytest.fixture(scope="module")
def address(tiny, tmp_path_factory) -> Iterator[str]:
    """A server of the bundled model and of a tiny segmenter."""
    segmenter = streets(tiny, tmp_path_factory.mktemp("tasks"))
    settings = Settings(models=(BUNDLED_MODEL, segmenter), device="cpu", max_batch=1, max_graphs=0)
    with listening(create_app(settings)) as address:
        yield f"http://{address}"


@pytest.fixture
def scene(page) -> Page:
    """The page with the segmenter, at rate 2."""
    use_segmenter(page)
    return page


def use_segmenter(page: Page) -> None:
    page.locator("#model").select_option("streets")
    expect(lane(page).locator(".call")).to_contain_text("/v1/segment?rate=2&")
    expect(lane(page)).to_have_attribute("aria-busy", "false")


def segment(address: str, rate: int, sample: str = "cup") -> tuple[dict, np.ndarray]:
    """What the server itself says of a sample, and the class of each pixel."""
    files = {"file": (SAMPLES / f"{sample}.jpg").read_bytes()}
    query = {"model": "streets", "rate": rate}
    told = httpx.post(f"{address}/v1/segment", params=query, files=files, timeout=60).json()
    runs = np.array(told["runs"])
    return told, np.repeat(runs[::2], runs[1::2]).reshape(told["size"])


def colours(canvas: Locator) -> np.ndarray:
    """The colours [12, 16, 3] of a canvas, at points evenly apart."""
    found = canvas.evaluate(
        """(canvas) => [...Array(192).keys()].map((at) => {
            const x = Math.floor(((at % 16) + 0.5) * canvas.width / 16);
            const y = Math.floor((Math.floor(at / 16) + 0.5) * canvas.height / 12);
            return [...canvas.getContext("2d").getImageData(x, y, 1, 1).data].slice(0, 3);
        })"""
    )
    return np.array(found).reshape(12, 16, 3)


def points(classes: np.ndarray) -> np.ndarray:
    """The classes [12, 16] at the same points."""
    (height, width), (down, across) = classes.shape, np.indices((12, 16))
    return classes[
        ((down + 0.5) * height / 12).astype(int), ((across + 0.5) * width / 16).astype(int)
    ]


def opacity(page: Page, percent: int) -> None:
    page.get_by_label("Opacity").fill(str(percent))


def legend(told: dict) -> list[tuple[str, str]]:
    """Classes and shares, as a lane should show them."""
    return [
        (each["label"], f"{100 * each['share']:.1f} %" if each["share"] >= 0.0005 else "< 0.1 %")
        for each in told["classes"]
    ]


@in_browser
def test_the_classes_are_over_the_photo_as_the_server_says(page, address):
    sent = []
    page.on("request", lambda request: sent.append(request.url.removeprefix(f"{address}/page/")))
    page.reload()
    answered(page, 2)
    expect(page.locator("#model option")).to_have_text(["imagenet", "streets (segmentation)"])
    assert "lane.js" in sent
    assert "segmentation.js" not in sent  # only who needs it loads it
    use_segmenter(page)
    assert {"segmentation.js", "segmentation.css"} <= set(sent)
    told, classes = segment(address, 2)
    assert len(told["classes"]) == 3
    assert shown(page) == legend(told)
    gmacs = float(lane(page).locator(".macs").inner_text().removesuffix(" GMACs"))
    assert gmacs == pytest.approx(told["macs"] / 1e9, rel=0.01)
    expect(lane(page).locator(".caption")).to_contain_text(
        f"{classes.shape[1]} × {classes.shape[0]} pixels, {len(told['classes'])} classes"
    )
    canvas = lane(page).locator("canvas")
    box = canvas.bounding_box()
    assert box["width"] / box["height"] == pytest.approx(
        classes.shape[1] / classes.shape[0], rel=0.02
    )
    opacity(page, 100)
    there = np.array(COLOURS)[points(classes)]
    assert (colours(canvas) == there).all(axis=-1).mean() > 0.97
    opacity(page, 0)
    photo = colours(canvas)
    assert not (photo == there).all(axis=-1).any()
    opacity(page, 50)
    assert np.abs(colours(canvas) - (photo + there) / 2).mean() < 8  # borders are stronger


@in_browser
def test_one_class_is_shown_alone_and_each_is_said_by_keyboard(scene, address):
    told, classes = segment(address, 2)
    canvas, caption = lane(scene).locator("canvas"), lane(scene).locator(".caption")
    opacity(scene, 100)
    first = lane(scene).locator(".class").first
    first.focus()
    scene.keyboard.press("Enter")
    expect(first).to_have_attribute("aria-pressed", "true")
    alone = (points(classes) == told["classes"][0]["index"])[..., None]
    own = (colours(canvas) == np.array(COLOURS)[points(classes)]).all(axis=-1, keepdims=True)
    assert (own == alone).mean() > 0.97
    scene.keyboard.press("Enter")
    expect(first).to_have_attribute("aria-pressed", "false")
    canvas.focus()
    scene.keyboard.press("ArrowLeft")
    scene.keyboard.press("ArrowLeft")
    expect(caption).to_contain_text(" % of the photo")
    assert caption.inner_text().split(",")[0] in {each["label"] for each in told["classes"]}
    expect(lane(scene).locator(".spoken")).to_have_text(caption.inner_text())
    scene.keyboard.press("Escape")
    expect(caption).to_contain_text("The whole photo")
    scene.get_by_label("Opacity").focus()
    before = colours(canvas)
    scene.keyboard.press("Home")
    assert (colours(canvas) != before).any()


@in_browser
def test_two_rates_are_compared_pixel_by_pixel(scene, address):
    scene.get_by_label("Compare two rates").check()
    answered(scene, 0, "B")
    slide(scene, MAX_RATE)
    (one, own), (two, other) = segment(address, MAX_RATE), segment(address, 0)
    verdict = scene.locator("#verdict")
    expect(verdict).to_contain_text(f"{100 * (own == other).mean():.1f} % of the pixels")
    expect(verdict).to_contain_text(
        f"A takes {100 * one['macs'] / two['macs']:.0f} % of B’s compute"
    )
    pairs = (256 * own + other)[own != other]
    a, b = divmod(int(np.bincount(pairs).argmax()), 256)
    names = ["road", "sky", "tree"]
    expect(verdict).to_contain_text(f"{names[a]} in A, {names[b]} in B")
    shares = [{each["label"]: each["share"] for each in told["classes"]} for told in (one, two)]
    for item in lane(scene).locator(".predictions li").all():
        label = item.locator(".label").inner_text()
        change = 100 * (shares[0][label] - shares[1].get(label, 0))
        if label in shares[1] and abs(change) >= 0.05:
            note = f"{'+' if change > 0 else '−'}{abs(change):.1f}"
            expect(item.locator(".note")).to_have_text(note)
    opacity(scene, 100)
    scene.get_by_label("Only where they differ").check()
    differ = points(own) != points(other)
    for name, classes in (("A", own), ("B", other)):
        seen = colours(lane(scene, name).locator("canvas"))
        coloured = (seen == np.array(COLOURS)[points(classes)]).all(axis=-1)
        assert (coloured == differ).mean() > 0.97
    scene.get_by_label("Compare two rates").uncheck()
    expect(scene.get_by_label("Only where they differ")).to_be_hidden()
    coloured = colours(lane(scene).locator("canvas")) == np.array(COLOURS)[points(own)]
    assert coloured.all(axis=-1).mean() > 0.97


@in_browser
def test_the_address_and_the_line_for_a_terminal_lead_to_the_same(page, address):
    page.goto(f"{address}/?model=streets&rate=2&compensate=false&sample=cat")
    answered(page, 2)
    expect(lane(page).locator(".call")).to_contain_text("cat.jpg")
    assert page.url == f"{address}/?rate=2&model=streets&compensate=false&sample=cat"
    line = lane(page).locator(".call").inner_text().replace("curl ", "curl -sS ")
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=True)
    assert legend(json.loads(done.stdout)) == shown(page)


@in_browser
def test_models_of_both_kinds_take_turns(scene, tmp_path):
    (tmp_path / "notes.txt").write_text("no picture")
    scene.locator("#file").set_input_files(tmp_path / "notes.txt")
    expect(lane(scene).get_by_role("alert")).to_contain_text("the content is not a JPEG")
    scene.get_by_role("group", name="Sample photos").get_by_role("button").nth(1).click()
    expect(lane(scene).locator(".class").first).to_be_visible()
    expect(scene.get_by_label("Groups")).to_be_hidden()
    scene.locator("#model").select_option("imagenet")
    expect(lane(scene).locator(".caption")).to_contain_text("224 × 224 pixels, 196 patches")
    expect(scene.get_by_label("Opacity")).to_be_hidden()
    expect(scene.get_by_role("heading", name="Accuracy for its compute")).to_be_visible()
    expect(lane(scene).locator(".predictions .bar-of")).to_have_count(5)
    scene.locator("#model").select_option("streets")
    expect(lane(scene).locator(".class").first).to_be_visible()
    scene.get_by_role("button", name="Measure every rate").click()
    expect(scene.get_by_role("button", name="Measure every rate")).to_be_visible()
    expect(scene.locator(".latency .point.bank")).to_have_count(MAX_RATE + 1)


@in_browser
@pytest.mark.parametrize(("scheme", "width"), [("light", 1280), ("dark", 390)])
def test_nobody_is_kept_out(scene, scheme, width):
    scene.emulate_media(color_scheme=scheme)
    scene.set_viewport_size({"width": width, "height": 844})
    assert violations(scene) == []
    scene.get_by_label("Compare two rates").check()
    answered(scene, 0, "B")
    scene.get_by_label("Only where they differ").check()
    lane(scene).locator(".class").first.click()
    assert violations(scene) == []
    for narrow in (width, 320):
        scene.set_viewport_size({"width": narrow, "height": 844})
        assert scene.evaluate("document.documentElement.scrollWidth") == narrow
