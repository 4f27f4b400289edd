"""The page: its files, over HTTP."""

import re
from pathlib import Path

import pytest

from tests.server.conftest import problem
from tests.server.page.conftest import FILES, KINDS, PAGE
from tests.test_packaging import SAMPLES


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


def test_a_preview_of_a_link_has_words(client):
    text = client.get("/").text
    for kind in ('name="description"', 'property="og:title"', 'property="og:description"'):
        assert re.search(rf'<meta {kind} content="[^"]{{10,}}">', text)


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


def with_imports(*names: str) -> set[str]:
    """Files, and those that they cannot do without."""
    found, new = set[str](), set(names)
    while new:
        found |= new
        text = "".join((PAGE / name).read_text("utf-8") for name in new)
        new = set(re.findall(r'from "\./(.+?)"|(?:src|href)="page/([^/"]+)"', text))
        new = {name for pair in new for name in pair if name} - found
    return found


def size(names: set[str]) -> int:
    return sum((PAGE / name).stat().st_size for name in names)


def test_the_page_is_light():
    first = with_imports("index.html")
    assert size(first) < 72 * 1024
    # What is loaded when it is wanted:
    segmentation = with_imports("segmentation.js", "segmentation.css") - first
    programs = with_imports("programs.js") - first
    cascade = with_imports("cascade.js") - first
    assert size(segmentation) < 16 * 1024
    assert size(programs) < 4 * 1024
    assert size(cascade) < 4 * 1024
    assert first | segmentation | programs | cascade == set(FILES)
