"""The page in a browser: the lines and programs that ask the server the same."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from tests.server.page.conftest import ROOT, answered, in_browser, lane, read, shown
from tests.test_packaging import SAMPLES

RUN = {
    "Python": [sys.executable, "-c"],
    "JavaScript": ["node", "--input-type=module", "-e"],
}


@in_browser
def test_the_line_for_a_terminal_asks_the_same(page, tmp_path):
    photo = tmp_path / 'it\'s "a" cup;1.jpg'
    shutil.copy(SAMPLES / "cup.jpg", photo)
    page.locator("#file").set_input_files(photo)
    expect(lane(page).locator(".call")).to_contain_text("cup;1.jpg")
    answered(page, 2)
    run_again(page, tmp_path)
    page.get_by_role("group", name="Sample photos").get_by_role("button").nth(3).click()
    expect(lane(page).locator(".call")).to_contain_text("cat.jpg")
    answered(page, 2)
    run_again(page, tmp_path)


def run_again(page: Page, folder: Path) -> None:
    line = lane(page).locator(".call").inner_text().replace("curl ", "curl -sS ")
    done = subprocess.run(
        ["bash", "-c", line], cwd=folder, capture_output=True, text=True, check=True
    )
    assert read(json.loads(done.stdout)) == shown(page)


@in_browser
@pytest.mark.parametrize("language", RUN)
def test_the_programs_ask_the_same(page, tmp_path, language):
    if shutil.which(RUN[language][0]) is None:
        pytest.skip(f"needs {RUN[language][0]} on the PATH")
    lane(page).get_by_label("Repair with the bank").uncheck()
    expect(lane(page).locator(".delta")).to_contain_text("left out")
    lane(page).get_by_label("Ask the same with").select_option(language)
    expect(lane(page).locator(".call")).not_to_contain_text("curl")
    assert run_program(page, tmp_path, language) == shown(page)[0][0]

    photo = tmp_path / 'my "own" cat.jpg'
    shutil.copy(SAMPLES / "cat.jpg", photo)
    page.locator("#file").set_input_files(photo)
    expect(lane(page).locator(".call")).to_contain_text('my \\"own\\" cat.jpg')
    assert run_program(page, tmp_path, language) == shown(page)[0][0]


def run_program(page: Page, folder: Path, language: str) -> str:
    program = lane(page).locator(".call").inner_text()
    done = subprocess.run(
        [*RUN[language], program],
        cwd=folder,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip().replace("_", " ")


@in_browser
def test_a_call_is_copied_by_keyboard(page, address):
    page.context.grant_permissions(["clipboard-read", "clipboard-write"], origin=address)
    lane(page).get_by_label("Ask the same with").focus()
    page.keyboard.press("ArrowDown")
    expect(lane(page).locator(".call")).to_contain_text("with Client")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    expect(lane(page).get_by_role("button", name="Copied")).to_be_visible()
    copied = page.evaluate("navigator.clipboard.readText()")
    assert copied == lane(page).locator(".call").inner_text()
    assert f'with Client("{address}/") as client:' in copied
