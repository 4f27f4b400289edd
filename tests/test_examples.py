"""The examples run, and do what they say."""

import csv
import io
import json
import os
import random
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import yaml
from fastapi.testclient import TestClient
from PIL import Image

import tocom
from examples import batch_folder, embed_in_fastapi, gradio_demo
from tests.test_packaging import PYPROJECT

EXAMPLES = Path(__file__).parents[1] / "examples"
PHOTOS = tocom.bundled_folder("samples")
CUP = PHOTOS / "cup.jpg"


def damaged_png() -> bytes:
    """A picture whose header is sound, and whose data is of no kind that there is."""
    written = io.BytesIO()
    Image.frombytes("RGB", (200, 200), random.Random(0).randbytes(3 * 200 * 200)).save(
        written, "PNG"
    )
    head, first, second = written.getvalue().split(b"IDAT")
    return head + b"IDAT" + first + bytes(4) + second


DAMAGED = damaged_png()


def test_every_example_is_in_the_list():
    listed = set(re.findall(r"\]\(([\w/.]+)\)", (EXAMPLES / "README.md").read_text("utf-8")))
    there = {
        path.relative_to(EXAMPLES).as_posix()
        for path in EXAMPLES.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert listed == there - {"README.md"}


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    for name in ("cup", "shuttle"):
        shutil.copy(PHOTOS / f"{name}.jpg", folder / "more")
    (folder / "broken.png").write_bytes(b"no picture")
    (folder / "damaged.png").write_bytes(DAMAGED)
    (folder / "notes.txt").write_text("no picture either")
    return folder


@pytest.mark.parametrize(
    ("options", "rate"), [([], 0), (["--rate", "2"], 2), (["--budget", "0.75"], 2)]
)
def test_a_folder_becomes_a_table(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], rate: int
):
    table = tmp_path / "table.tsv"
    batch_folder.main([str(photos), str(table), "--batch-size", "2", *options])
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file, dialect="excel-tab"))
    unreadable, readable = ["broken.png", "damaged.png"], ["more/cup.jpg", "more/shuttle.jpg"]
    assert [row["picture"] for row in rows] == [*unreadable, *readable]
    assert {row[column] for row in rows[:2] for column in ("label", "score")} == {""}
    assert rows[2]["label"] == "espresso"
    assert 0 < float(rows[2]["score"]) < 1
    assert capsys.readouterr().out == f"4 pictures at rate {rate}: {table}\n"


def test_a_budget_below_all_rates_is_refused(photos: Path, tmp_path: Path):
    with pytest.raises(SystemExit, match=r"no rate up to 4 fits into the budget 0\.1"):
        batch_folder.main([str(photos), str(tmp_path / "table.tsv"), "--budget", "0.1"])


def test_an_application_answers_each_request_at_its_rate():
    with TestClient(embed_in_fastapi.create_app()) as client:

        def ask(rate: int) -> dict[str, Any]:
            answer = client.post(f"/classify?rate={rate}", files={"file": CUP.read_bytes()})
            assert answer.status_code == 200, answer.text
            return dict(answer.json())

        rates = [0, 4, 2, 0, 4, 2]
        with ThreadPoolExecutor(len(rates)) as pool:
            together = list(pool.map(ask, rates))
        assert together == [ask(rate) for rate in rates]  # no rate leaks into another request
        assert [answer["label"] for answer in together[:4:3]] == ["espresso", "espresso"]
        assert [answer["rate"] for answer in together] == rates
        assert together[0]["macs"] > together[2]["macs"] > together[1]["macs"]


@pytest.mark.parametrize(
    ("rate", "data", "says"),
    [
        ("5", CUP.read_bytes(), "at most 4"),
        ("-1", CUP.read_bytes(), "greater than or equal to 0"),
        ("2", b"no picture", "no picture that can be read"),
        ("2", CUP.read_bytes()[:2000], "no picture that can be read"),
        ("2", DAMAGED, "no picture that can be read"),
    ],
)
def test_an_application_refuses_what_it_cannot_answer(rate: str, data: bytes, says: str):
    with TestClient(embed_in_fastapi.create_app()) as client:
        answer = client.post(f"/classify?rate={rate}", files={"file": data})
        assert answer.status_code == 422
        assert says in answer.text


def test_a_demo_shows_what_a_rate_costs_and_merges():
    demo = gradio_demo.Demo()
    with Image.open(CUP) as photo:
        scores, whole, cost = demo.show(photo, 0)
        _, merged, less = demo.show(photo, 4)
    assert max(scores, key=lambda label: scores[label]) == "espresso"
    assert cost == "100% of the multiply-adds of the stock model; 197 of 197 tokens left"
    assert less == "50% of the multiply-adds of the stock model; 20 of 197 tokens left"
    assert whole.size == merged.size == (224, 224)

    def patches(picture: Image.Image) -> set[bytes]:
        corners = [(x, y) for y in range(0, 224, 16) for x in range(0, 224, 16)]
        return {picture.crop((x, y, x + 16, y + 16)).tobytes() for x, y in corners}

    # Each patch is as it was, or one of the few means.
    assert len(patches(whole)) == 196
    assert len(patches(merged)) <= 19


def test_a_demo_says_what_it_needs(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(SystemExit, match="the demo needs gradio: pip install gradio"):
        gradio_demo.build(gradio_demo.Demo())


def test_a_space_is_described_as_the_hub_wants_it():
    _, header, text = (EXAMPLES / "space" / "README.md").read_text("utf-8").split("---\n", 2)
    space = yaml.safe_load(header)
    assert space["sdk"] == "gradio"
    assert space["license"] == "apache-2.0"
    assert len(space["short_description"]) <= 60
    assert f"`{space['app_file']}` | `examples/gradio_demo.py`" in text
    named = set(re.findall(r"tocom_serve-(.+?)-py3", text))
    assert named == {PYPROJECT["project"]["version"]}


NOTEBOOK = json.loads((EXAMPLES / "from_timm_to_service.ipynb").read_text("utf-8"))


def test_the_notebook_is_one_and_has_no_outputs():
    assert (NOTEBOOK["nbformat"], NOTEBOOK["nbformat_minor"]) == (4, 5)
    assert NOTEBOOK["metadata"]["kernelspec"]["language"] == "python"
    keys = {"cell_type", "id", "metadata", "source"}
    for cell in NOTEBOOK["cells"]:
        ran = {"execution_count", "outputs"} if cell["cell_type"] == "code" else set()
        assert cell.keys() == keys | ran
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None
    ids = [cell["id"] for cell in NOTEBOOK["cells"]]
    assert len(set(ids)) == len(ids)


def test_the_cells_of_the_notebook_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    # What a server that nobody loads needs not have, it need not make ready.
    monkeypatch.setenv("TOCOM_MAX_BATCH", "1")
    monkeypatch.setenv("TOCOM_MAX_GRAPHS", "0")
    names: dict[str, Any] = {"__name__": "notebook"}
    for cell in NOTEBOOK["cells"]:
        if cell["cell_type"] == "code":
            code = compile("".join(cell["source"]), f"cell {cell['id']}", "exec")
            exec(code, names)
    said = capsys.readouterr().out
    assert re.search(r"rate 4: 50% of the work, 20 tokens left", said)
    assert re.search(r"\{'rate': 4\}: .+ at rate 4, 50% of the work \(asked\)", said)
    assert re.search(r"\{'budget': 0\.75\}: .+ at rate 2, 74% of the work", said)
    # The server has ended with the notebook; on some machines by the signal itself.
    assert names["service"].returncode is not None


K6 = """
import script, { options, draw } from "./mixed_rates.mjs";
for (let i = 0; i < 200; i++) script();
const drawn = [0, 0.5, 0.8, 0.95].map(draw);
console.log(JSON.stringify({ options, drawn, posts: globalThis.posts }));
"""


@pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")
def test_the_k6_script_mixes_rates(tmp_path: Path):
    """With stand-ins for k6's modules."""
    k6 = tmp_path / "node_modules" / "k6"
    k6.mkdir(parents=True)
    exports = {".": "./k6.mjs", "./http": "./http.mjs"}
    (k6 / "package.json").write_text(json.dumps({"name": "k6", "exports": exports}))
    (k6 / "k6.mjs").write_text("export const check = () => true;")
    (k6 / "http.mjs").write_text(
        "globalThis.posts = [];"
        "export default { post: (url, body, how) => globalThis.posts.push({ url, body, how }) };"
    )
    shutil.copy(EXAMPLES / "load" / "mixed_rates.js", tmp_path / "mixed_rates.mjs")
    (tmp_path / "main.mjs").write_text(
        "globalThis.__ENV = {}; globalThis.open = (path) => path; await import('./run.mjs');"
    )
    (tmp_path / "run.mjs").write_text(K6)
    done = subprocess.run(
        ["node", str(tmp_path / "main.mjs")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["drawn"] == ["0", "2", "4", "auto"]
    for post in found["posts"]:
        rate = post["how"]["tags"]["rate"]
        assert post["url"] == f"http://127.0.0.1:8000/v1/classify?rate={rate}&top_k=1"
        assert (EXAMPLES / "load" / post["body"]).samefile(CUP)
    asked = {post["how"]["tags"]["rate"] for post in found["posts"]}
    assert {"0", "2", "4"} <= asked
    assert len(found["options"]["thresholds"]) == 4


def test_the_oha_line_mixes_rates(tmp_path: Path):
    """With a stand-in for oha, which says how it was called."""
    oha = tmp_path / "oha"
    oha.write_text('#!/bin/sh\nprintf "%s\\n" "$PWD" "$@"\n')
    oha.chmod(0o755)
    done = subprocess.run(
        ["sh", str(EXAMPLES / "load" / "oha.sh")],
        env=os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=True,
    )
    folder, *arguments = done.stdout.splitlines()
    assert (Path(folder) / arguments[arguments.index("-D") + 1]).samefile(CUP)
    for rate in ("0", "2", "4", "auto"):
        url = f"http://127.0.0.1:8000/v1/classify?rate={rate}&top_k=1"
        assert re.fullmatch(arguments[-1], url)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_pictures_are_read_as_they_come(kind: str, tmp_path: Path):
    written = io.BytesIO()
    Image.new("LA", (40, 30)).convert("L" if kind == "JPEG" else "LA").save(written, kind)
    path = tmp_path / "grey"
    path.write_bytes(written.getvalue())
    backbone = tocom.load_backbone("bundled:deit_tiny")
    _, image = batch_folder.Pictures([path], backbone)[0]
    assert image is not None
    assert image.shape == (3, 224, 224)
