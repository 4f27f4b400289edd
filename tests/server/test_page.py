"""The page: its files over HTTP, and in a real browser with the bundled model."""

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Browser, Page, Route, expect, sync_playwright

from server import Settings, create_app
from server.settings import BUNDLED_MODEL
from tests.server.conftest import listening, problem
from tests.test_packaging import PYPROJECT, SAMPLES
from tocom.backbones import bundled_folder

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "server" / "page"
FILES = sorted(path.name for path in PAGE.iterdir())
KINDS = {
    ".css": ("text/css",),
    ".html": ("text/html",),
    ".js": ("text/javascript", "application/javascript"),
    ".svg": ("image/svg+xml",),
}

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
ARGUMENTS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip
MODEL = bundled_folder("deit_tiny_caltech101")

expect.set_options(timeout=20_000)  # a busy machine is no fault of the page
in_browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed")


# Over HTTP


@pytest.mark.parametrize("name", FILES)
def test_files_are_served_with_their_type_and_a_strict_policy(client, name):
    answer = client.get(f"/page/{name}")
    assert answer.content == (PAGE / name).read_bytes()
    assert answer.headers["content-type"].partition(";")[0] in KINDS[Path(name).suffix]
    policy = dict(
        part.strip().split(" ", 1) for part in answer.headers["content-security-policy"].split(";")
    )
    assert policy.pop("img-src") == "'self' blob:"
    assert set(policy.values()) == {"'none'", "'self'"}
    assert policy["default-src"] == "'none'"
    assert answer.headers["x-content-type-options"] == "nosniff"


def test_the_page_is_at_the_root(client):
    answer = client.get("/")
    assert answer.content == (PAGE / "index.html").read_bytes()
    assert "content-security-policy" in answer.headers
    assert client.head("/").status_code == 200


def test_what_has_not_changed_is_not_sent_again(client):
    first = client.get("/page/app.js")
    assert first.headers["cache-control"] == "no-cache"
    again = client.get("/page/app.js", headers={"If-None-Match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")


def test_every_sample_is_on_the_page_and_served(client):
    shown = re.findall(r'src="page/samples/(.+?)" alt="[^"]+"', client.get("/").text)
    assert sorted(shown) == sorted(path.name for path in SAMPLES.glob("*.jpg"))
    for name in (*shown, "LICENSES.md"):
        assert client.get(f"/page/samples/{name}").content == (SAMPLES / name).read_bytes()


@pytest.mark.parametrize(
    "path", ["missing.js", "..%2Fpage.py", "%00", "samples/missing.jpg", 999 * "a"]
)
def test_there_is_nothing_else(client, path):
    answer = client.get(f"/page/{path}")
    assert answer.status_code == 404
    assert "there is nothing at" in problem(answer)


def test_nothing_comes_from_elsewhere():
    text = "".join((PAGE / name).read_text("utf-8") for name in FILES)
    namespaces = {"http://www.w3.org/2000/svg"}
    assert set(re.findall(r"https?://[^\s\"'`]+", text)) == namespaces
    assert not re.search(r"@import|(src|href)=[\"']//|\bstyle=\"|\bon\w+=\"", text)


def test_the_page_is_light():
    assert sum((PAGE / name).stat().st_size for name in FILES) < 60 * 1024


def test_the_wheel_holds_the_page():
    patterns = PYPROJECT["tool"]["setuptools"]["package-data"]["server"]
    packed = {path.name for pattern in patterns for path in (ROOT / "server").glob(pattern)}
    assert packed >= set(FILES)


# In a browser


@pytest.fixture(scope="module")
def address(tiny) -> Iterator[str]:
    """A server of the bundled model, which was measured, and of a tiny one, which was not."""
    settings = Settings(models=(BUNDLED_MODEL, tiny), device="cpu", max_batch=1)
    with listening(create_app(settings)) as address:
        yield f"http://{address}"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture
def page(browser, address) -> Iterator[Page]:
    """The page as a visitor finds it; in the end nothing was broken and nothing fetched outside."""
    context = browser.new_context(viewport={"width": 1280, "height": 900}, reduced_motion="reduce")
    context.set_default_timeout(60_000)
    page = context.new_page()
    faults, elsewhere = [], []
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("console", lambda said: faults.append(said.text) if "Policy" in said.text else None)
    page.on("request", lambda sent: elsewhere.append(sent.url))
    page.goto(address)
    answered(page, 8)
    yield page
    context.close()
    assert faults == []
    assert [url for url in elsewhere if not url.startswith((address, f"blob:{address}"))] == []


def lane(page: Page, name: str = "A"):
    return page.locator(f".lane[data-lane={name}]")


def answered(page: Page, rate: int | str, name: str = "A") -> None:
    """Wait until a lane shows the answer to its last question, asked at a rate."""
    expect(lane(page, name).locator(".call")).to_contain_text(f"rate={rate}&")
    expect(lane(page, name)).to_have_attribute("aria-busy", "false")


def slide(page: Page, rate: int, name: str = "A") -> None:
    lane(page, name).get_by_role("slider").fill(str(rate))
    answered(page, rate, name)


def ask(address: str, photo: bytes, **query: object) -> dict:
    """Ask the server itself."""
    answer = httpx.post(
        f"{address}/v1/classify", params={"top_k": 5, **query}, files={"file": photo}, timeout=60
    )
    assert answer.status_code == 200, answer.text
    return answer.json()


def shown(page: Page, name: str = "A") -> list[tuple[str, str]]:
    """The predictions of a lane, as they are read."""
    items = lane(page, name).locator(".predictions li").all()
    return [
        (item.locator(".label").inner_text(), item.locator(".score").inner_text()) for item in items
    ]


def read(answer: dict) -> list[tuple[str, str]]:
    """The predictions of an answer, as a lane should show them."""
    return [
        (each["label"].replace("_", " "), f"{100 * each['score']:.1f} %")
        for each in answer["predictions"]
    ]


@in_browser
def test_a_chosen_photo_is_answered_and_another_rate_changes_the_answer(page, address):
    cat = SAMPLES / "cat.jpg"
    page.locator("#file").set_input_files(cat)
    expect(lane(page).locator(".call")).to_contain_text("cat.jpg")
    answered(page, 8)
    at_8 = shown(page)
    assert at_8 == read(ask(address, cat.read_bytes(), rate=8))
    expect(lane(page).locator(".tokens")).to_have_text("197 → 101")

    slide(page, 16)
    assert shown(page) == read(ask(address, cat.read_bytes(), rate=16))
    assert shown(page) != at_8
    expect(lane(page).locator(".tokens")).to_have_text("197 → 11")
    expect(lane(page).locator(".macs")).to_have_text("0.624 GMACs")
    expect(lane(page).locator(".ratio")).to_have_text("50 % of the stock model")

    lane(page).get_by_label("Repair with the bank").uncheck()
    expect(lane(page).locator(".delta")).to_contain_text("left out")
    assert shown(page) == read(ask(address, cat.read_bytes(), rate=16, compensate=False))


@in_browser
@pytest.mark.parametrize("way", ["drop", "paste"])
def test_a_photo_may_be_dropped_or_pasted(page, address, way):
    page.evaluate(
        """async (way) => {
            const data = new DataTransfer();
            const photo = await (await fetch("page/samples/dahlia.jpg")).blob();
            data.items.add(new File([photo], "mine.jpg", { type: "image/jpeg" }));
            const bubbles = { bubbles: true, cancelable: true };
            document.body.dispatchEvent(way === "drop"
                ? new DragEvent("drop", { ...bubbles, dataTransfer: data })
                : new ClipboardEvent("paste", { ...bubbles, clipboardData: data }));
        }""",
        way,
    )
    expect(lane(page).locator(".call")).to_contain_text("mine.jpg")
    answered(page, 8)
    assert shown(page) == read(ask(address, (SAMPLES / "dahlia.jpg").read_bytes(), rate=8))


@in_browser
@pytest.mark.parametrize("name", ["cup.jpg", "dahlia.jpg"])  # wide and upright
def test_merged_patches_have_the_mean_colour_of_what_the_model_sees(page, address, name):
    page.get_by_role("group", name="Sample photos").locator(f"[src$='{name}']").click()
    expect(lane(page).locator(".call")).to_contain_text(name)
    slide(page, 16)
    photo = (SAMPLES / name).read_bytes()
    merge_map = ask(address, photo, rate=16, merge_map=True)["merge_map"]
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
    slide(page, 12)
    photo = (SAMPLES / "cup.jpg").read_bytes()
    tokens = ask(address, photo, rate=12, merge_map=True)["merge_map"]["tokens"]
    canvas, caption = lane(page).locator("canvas"), lane(page).locator(".caption")
    expect(caption).to_have_text(re.compile(r"196 patches in 52 groups"))
    before = centres(page)

    box = canvas.bounding_box()
    canvas.hover(position={"x": box["width"] * 2.5 / 14, "y": box["height"] * 9.5 / 14})
    expect(caption).to_have_text(said(tokens, 9 * 14 + 2))
    changed = np.abs(centres(page) - before).max(axis=1) > 0
    others = np.array(tokens) != tokens[9 * 14 + 2]
    assert changed[others].all()  # all others fade

    page.mouse.move(0, 0)
    expect(caption).to_contain_text("52 groups")
    canvas.focus()
    page.keyboard.press("ArrowDown")  # begins in the middle
    expect(caption).to_have_text(said(tokens, 7 * 14 + 7))
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowLeft")
    expect(caption).to_have_text(said(tokens, 8 * 14 + 6))
    expect(lane(page).locator(".spoken")).to_have_text(said(tokens, 8 * 14 + 6))
    page.keyboard.press("Escape")
    expect(caption).to_contain_text("52 groups")


def said(tokens: list[int], patch: int) -> str:
    count = tokens.count(tokens[patch])
    return f"{count} {'patch' if count == 1 else 'patches'} → 1 token"


@in_browser
def test_two_rates_are_compared(page, address):
    page.get_by_label("Compare two rates").check()
    answered(page, 0, "B")
    slide(page, 16)
    photo = (SAMPLES / "cup.jpg").read_bytes()
    dear, cheap = (ask(address, photo, rate=rate) for rate in (0, 16))
    assert (shown(page), shown(page, "B")) == (read(cheap), read(dear))
    expect(page.locator("#verdict")).to_contain_text("Both say cup. A takes 50 % of B’s compute")
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
    lane(page).get_by_role("slider").fill("5")
    answered(page, 5)
    expect(lane(page).get_by_label("Auto")).not_to_be_checked()
    expect(lane(page).locator(".reason")).to_be_empty()


@in_browser
def test_what_was_measured_is_drawn_and_what_was_not_is_said(page):
    config = json.loads((MODEL / "config.json").read_text())
    rows = {row["target"]: row for row in config["evaluation"]["rows"]}
    slide(page, 12)
    plain, bank = (f"{rows[12][kind]['top1']:.1f} %" for kind in ("plain", "bank"))
    words = page.locator(".accuracy-words")
    expect(words).to_have_text(f"Rate 12: {plain} plain, {bank} with the bank.")
    expect(page.locator(".accuracy .point.bank")).to_have_count(len(rows))
    expect(page.locator(".latency-words")).to_contain_text("Rate 12: ")
    page.get_by_label("Agreement").check()
    agreement = rows[12]["bank"]["agreement"]
    expect(words).to_contain_text(f"{agreement:.1f} % with the bank")

    slide(page, 7)
    expect(words).to_have_text("Rate 7: not measured.")
    expect(page.locator(".accuracy .mark")).to_have_count(1)

    page.get_by_role("button", name="Measure every rate").click()
    expect(page.get_by_role("button", name="Measure every rate")).to_be_visible()
    expect(page.locator(".latency .point.bank")).to_have_count(17)

    page.get_by_role("combobox").select_option("tiny")
    expect(page.get_by_text("Nothing measured is attached")).to_be_visible()
    answered(page, 5)  # the nearest that it has to 7
    expect(lane(page).locator(".caption")).to_contain_text("64 × 64 pixels, 16 patches")


@in_browser
def test_the_line_for_a_terminal_asks_the_same(page, tmp_path):
    photo = tmp_path / 'it\'s "a" cup;1.jpg'
    shutil.copy(SAMPLES / "cup.jpg", photo)
    page.locator("#file").set_input_files(photo)
    expect(lane(page).locator(".call")).to_contain_text("cup;1.jpg")
    answered(page, 8)
    run_again(page, tmp_path)
    page.get_by_role("group", name="Sample photos").get_by_role("button").nth(3).click()
    expect(lane(page).locator(".call")).to_contain_text("cat.jpg")
    answered(page, 8)
    run_again(page, tmp_path)


def run_again(page: Page, folder: Path) -> None:
    line = lane(page).locator(".call").inner_text().replace("curl ", "curl -sS ")
    done = subprocess.run(
        ["bash", "-c", line], cwd=folder, capture_output=True, text=True, check=True
    )
    assert read(json.loads(done.stdout)) == shown(page)


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

    def seam() -> int:
        return (
            lane(page)
            .locator("canvas")
            .evaluate(
                """(canvas) => canvas.getContext("2d")
                .getImageData(canvas.width - 1, canvas.height - 1, 1, 1).data[0]"""
            )
        )

    assert brightness() > 600
    assert seam() > 200
    page.emulate_media(color_scheme="dark")
    assert brightness() < 100
    assert seam() < 60
    page.get_by_role("button", name="Light or dark").click()
    assert brightness() > 600
    assert seam() > 200
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
    expect(lane(page).locator(".call")).to_contain_text("dahlia.jpg")
    tab_to("canvas")
    page.keyboard.press("ArrowUp")
    expect(lane(page).locator(".caption")).to_contain_text("→ 1 token")
    tab_to(".slider")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    answered(page, 10)
    expect(lane(page).locator(".spoken")).to_contain_text("Rate 10: ")
    tab_to(".auto")
    page.keyboard.press("Space")
    answered(page, "auto")


@in_browser
def test_what_the_server_refuses_is_said_in_its_words(page):
    page.locator("#file").set_input_files(ROOT / "pyproject.toml")
    alert = lane(page).get_by_role("alert")
    expect(alert).to_have_text("Unsupported type: the content is not a JPEG, PNG or WebP image")
    expect(lane(page).locator(".predictions")).to_be_hidden()
    page.get_by_role("group", name="Sample photos").get_by_role("button").first.click()
    expect(alert).to_be_hidden()
    expect(lane(page).locator(".predictions")).to_be_visible()


@in_browser
def test_the_page_outlives_a_restart(page):
    page.route("**/v1/**", lambda route: route.abort())
    lane(page).get_by_role("slider").fill("3")
    expect(page.locator("#away")).to_be_visible()
    expect(lane(page).get_by_role("alert")).to_contain_text("The server does not answer")
    page.unroute("**/v1/**")
    answered(page, 3)
    expect(page.locator("#away")).to_be_hidden()
    expect(lane(page).get_by_role("alert")).to_be_hidden()


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
def test_a_key_is_asked_for_and_sent(page):
    def guard(route: Route) -> None:
        if route.request.headers.get("x-api-key") == "a key":
            route.continue_()
        else:
            route.fulfill(status=401, json={"title": "Unauthorized", "detail": "a key is needed"})

    page.route("**/v1/classify*", guard)
    lane(page).get_by_role("slider").fill("3")
    page.get_by_label("This server wants an API key").fill("a key")
    page.keyboard.press("Enter")
    answered(page, 3)
    expect(lane(page).locator(".call")).to_contain_text('-H "X-API-Key: $KEY"')


@in_browser
def test_the_load_is_shown(page):
    expect(page.locator(".live .queued .now")).to_have_text("0 of 256")
    expect(page.locator(".live .speed polyline")).to_be_attached()
    expect(page.locator(".live .auto .now")).to_have_text(re.compile(r"^\d+$"))
