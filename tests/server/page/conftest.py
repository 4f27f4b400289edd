"""The page in a real browser, with the bundled model and a tiny one."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from server.app import create_app
from server.settings import BUNDLED_MODEL, Settings
from tests.server.conftest import listening
from tocom.backbones import bundled_folder

ROOT = Path(__file__).parents[3]
PAGE = ROOT / "server" / "page" / "static"
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
MODEL = bundled_folder("deit_tiny")

expect.set_options(timeout=120_000)  # a busy machine is no fault of the page
in_browser = pytest.mark.skipif(
    CHROMIUM is None,
    reason="needs a chromium on the PATH: apt install chromium (Debian), or chromium-browser",
)


@pytest.fixture(scope="package")
def address(tiny) -> Iterator[str]:
    """A server of the bundled model, which was measured, and of a tiny one, which was not."""
    settings = Settings(models=(BUNDLED_MODEL, tiny), device="cpu", max_batch=1, max_graphs=0)
    with listening(create_app(settings)) as address:
        yield f"http://{address}"


# Not longer than a module: while it lives, tests that start an event loop cannot.
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
    context.set_default_timeout(120_000)
    page = context.new_page()
    faults, elsewhere = [], []
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("console", lambda said: faults.append(said.text) if "Policy" in said.text else None)
    page.on("request", lambda sent: elsewhere.append(sent.url))
    page.goto(address)
    answered(page, 2)
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
