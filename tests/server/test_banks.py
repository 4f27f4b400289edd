"""Banks while serving: what changes, what cannot, and that nobody gets a mixture."""

import gc
import io
import itertools
import json
import math
import re
import shutil
import weakref
import zipfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from fastapi import FastAPI
from fastapi.testclient import TestClient
from safetensors.torch import save

from adapters import Bank, BankBackbone, BankInfo, Geometry, Store, compose
from adapters.bank import tensor_shapes
from server import ServedModel, Settings, bank_routes, load_model, models
from server.access import Access
from server.banks import Banks
from server.engine import Engine
from server.errors import UnusableBankError
from server.middleware import BodyLimit, RequestId
from server.problems import add_handlers
from server.registry import Registry
from tests.server.conftest import MAX_RATE, call, problem
from tests.tocom_models import small_model
from tocom import fold, forward, load_backbone

KEY = "admin-" + "a" * 16
MAX_BYTES = 500_000
NARROW = Geometry.of(small_model("vit_small"))


@pytest.fixture(scope="module")
def bare(tiny) -> ServedModel:
    return load_model(tiny.model_copy(update={"name": "bare", "bank": None, "source": 2}))


@pytest.fixture
def registry(served, bare) -> Registry:
    return Registry([served, bare])


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(tmp_path / "store")


@pytest.fixture
def swaps() -> list[str]:
    return []


@pytest.fixture
def app(registry, store, swaps) -> FastAPI:
    app = FastAPI()
    app.state.access = Access(Settings(admin_key=KEY))
    app.state.banks = Banks(registry, store, swaps.append)
    app.include_router(bank_routes.router)
    add_handlers(app)
    app.add_middleware(BodyLimit, max_bytes=1000, by_path={bank_routes.PATH: MAX_BYTES})
    app.add_middleware(RequestId)
    return app


@pytest.fixture
def admin(app) -> TestClient:
    return TestClient(
        app, headers={"Authorization": f"Bearer {KEY}"}, raise_server_exceptions=False
    )


@pytest.fixture(scope="session")
def make_bank(model_folder):
    backbone = BankBackbone.of(load_backbone(str(model_folder)))

    def make(seed: int = 0, name: str = "new", max_rate: int = MAX_RATE, **changes) -> Bank:
        info = BankInfo(
            name=name,
            backbone=backbone.model_copy(update=changes),
            max_rate=max_rate,
            rank=2,
            targets=("q", "v"),
            scale=1.0,
            training={"recipe": "none"},
        )
        draw = torch.Generator().manual_seed(seed)
        shapes = tensor_shapes(info).items()
        return Bank(info, {key: 0.3 * torch.randn(shape, generator=draw) for key, shape in shapes})

    return make


def files(bank: Bank) -> dict[str, bytes]:
    return {"info": bank.info.model_dump_json().encode(), "plugins": save(bank.tensors)}


def attach(admin: TestClient, model: str, bank: str):
    return admin.put(f"/v1/models/{model}/bank", json={"bank": bank})


def listed(admin: TestClient) -> dict[str, dict]:
    return {bank["name"]: bank for bank in admin.get("/v1/banks").json()["banks"]}


# What there is


def test_banks_that_are_served_and_bundled_are_listed(admin, served):
    found = listed(admin)
    assert list(found) == ["deit_tiny_patch16_224-tome", "tiny"]
    assert found["deit_tiny_patch16_224-tome"]["origin"] == "bundled"
    assert found["tiny"] == {
        "name": "tiny",
        "digest": served.bank.info.digest,
        "origin": "configuration",
        "max_rate": MAX_RATE,
        "rank": 2,
        "targets": ["q", "v"],
        "backbone": json.loads(served.bank.info.backbone.model_dump_json()),
        "parameters": served.bank.parameters,
        "models": ["tiny"],
    }


def test_an_uploaded_bank_is_published_as_it_is(admin, store, make_bank):
    bank = make_bank()
    answer = admin.post("/v1/banks", files=files(bank))
    assert answer.status_code == 201
    where = answer.headers["location"]
    assert where == f"/v1/banks/{bank.info.digest}"
    assert admin.get(where).json() == answer.json()
    assert answer.json()["training"] == {"recipe": "none"}
    assert listed(admin)["new"]["origin"] == "store"
    assert store.get("new").info == bank.info
    assert store.verify() == {}


def test_uploading_it_again_changes_nothing(admin, store, make_bank):
    assert admin.post("/v1/banks", files=files(make_bank())).status_code == 201
    assert admin.post("/v1/banks", files=files(make_bank())).status_code == 200
    assert len(store.versions()) == 1


@pytest.mark.parametrize("digits", [8, 12, 64])
def test_a_bank_is_found_by_the_beginning_of_its_digest(admin, served, digits):
    digest = served.bank.info.digest
    assert admin.get(f"/v1/banks/{digest[:digits]}").json()["digest"] == digest


def test_a_name_stands_for_what_was_published_last(admin, make_bank):
    old, new = make_bank(1), make_bank(2)
    for bank in (old, new):
        admin.post("/v1/banks", files=files(bank))
    assert admin.get("/v1/banks/new").json()["digest"] == new.info.digest
    by_digest = f"/v1/banks/new@{old.info.digest[:8]}"
    assert admin.get(by_digest).json()["digest"] == old.info.digest


@pytest.mark.parametrize("bank", ["nix", "0" * 64, "tiny@0000", "tiny@", "@", "@@", "x" * 5000])
def test_an_unknown_bank(admin, bank):
    for answer in (
        admin.get(f"/v1/banks/{bank}"),
        admin.delete(f"/v1/banks/{bank}"),
        attach(admin, "tiny", bank[:900]),
    ):
        assert answer.status_code == 404
        assert "GET /v1/banks lists what there is" in problem(answer)
        assert len(problem(answer)) < 400


def test_fewer_than_eight_digits_of_a_digest_are_not_enough(admin, served):
    assert admin.get(f"/v1/banks/{served.bank.info.digest[:7]}").status_code == 404


def test_digits_that_several_banks_begin_with(admin, store, make_bank):
    reference = store.publish(make_bank())
    folder = store.find(reference).folder
    digests = [folder.name[:60] + tail for tail in ("0000", "1111")]
    for digest in digests:
        twin = shutil.copytree(folder, folder.with_name(digest))
        info = json.loads((twin / "bank.json").read_text())
        (twin / "bank.json").write_text(json.dumps(info | {"digest": digest}))
    answer = attach(admin, "tiny", folder.name[:60])
    assert answer.status_code == 422
    assert all(f"new@{digest}" in problem(answer) for digest in digests)


def test_a_bank_whose_folder_is_damaged_does_not_hide_the_others(admin, store, make_bank, caplog):
    for name in ("good", "bad"):
        store.publish(make_bank(name=name))
    (store.find("bad").folder / "bank.json").write_text("{")
    assert {"good", "tiny"} <= listed(admin).keys()
    assert "bad" not in listed(admin)
    assert "a bank is left out: " in caplog.text


# What is not taken


def faulty(bank: Bank, fault: str) -> dict[str, bytes]:
    sound, tensors = files(bank), bank.tensors
    first = next(iter(tensors))
    plugins = sound["plugins"]
    archive = io.BytesIO()
    if fault == "pickle":
        torch.save(tensors, archive)
    else:
        with zipfile.ZipFile(archive, "w") as file:
            file.writestr("plugins.safetensors", plugins)
    info = json.loads(sound["info"])
    changed = {
        "truncated": {"plugins": plugins[:-100]},
        "flipped": {"plugins": plugins[:-4] + bytes([plugins[-4] ^ 1]) + plugins[-3:]},
        "nan": {"plugins": save(tensors | {first: torch.full_like(tensors[first], math.nan)})},
        "shape": {"plugins": save(tensors | {first: torch.zeros(3)})},
        "extra": {"plugins": save(tensors | {"more": torch.zeros(3)})},
        "missing": {"plugins": save({first: tensors[first]})},
        "empty": {"plugins": b""},
        "pickle": {"plugins": archive.getvalue()},
        "zip": {"plugins": archive.getvalue()},
        "json": {"info": b"{"},
        "nested": {"info": b"[" * 100_000},
        "no digest": {"info": json.dumps(info | {"digest": ""}).encode()},
        "format": {"info": json.dumps(info | {"format_version": 9}).encode()},
        "name": {"info": json.dumps(info | {"name": "../up"}).encode()},
        "huge": {"info": json.dumps(info | {"max_rate": 2**30}).encode()},
        "swapped": {"info": plugins, "plugins": sound["info"]},
    }
    return sound | changed[fault]


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("truncated", "plugins.safetensors is truncated or corrupted"),
        ("flipped", "does not match its digest"),
        ("nan", "holds NaN or infinity"),
        ("shape", "must be [5, 2, 192], got [3]"),
        ("extra", "has an unknown tensor more"),
        ("missing", "lacks tensor"),
        ("empty", "plugins.safetensors is truncated or corrupted"),
        ("pickle", "plugins.safetensors is truncated or corrupted"),
        ("zip", "plugins.safetensors is truncated or corrupted"),
        ("json", "bank.json cannot be read"),
        ("nested", "bank.json cannot be read"),
        ("no digest", "bank.json has no digest"),
        ("format", "bank format 9; this version reads format 1"),
        ("name", "bank.json: name: "),
        ("huge", "must be [1073741824, 2, 192], got [5, 2, 192]"),
        ("swapped", "bank.json cannot be read"),
    ],
)
def test_a_faulty_bank_is_refused_and_nothing_kept(admin, store, make_bank, fault, message):
    answer = admin.post("/v1/banks", files=faulty(make_bank(), fault))
    assert answer.status_code == 422
    assert message in problem(answer)
    assert not store.root.exists()


@pytest.mark.parametrize(
    "body",
    [
        {"files": {"info": b"{}"}},
        {"files": {"info": b"{}", "weights": b""}},
        {"files": [("info", b"{}"), ("info", b"{}")]},
        {"files": {"info": b"{}", "plugins": b"", "more": b""}},
        {"files": {"info": b"{}"}, "data": {"plugins": "text"}},
        {"content": b"", "headers": {"Content-Type": "multipart/form-data"}},
        {"content": b"x", "headers": {"Content-Type": "multipart/form-data; boundary=b"}},
    ],
)
def test_a_form_without_the_two_files(admin, body):
    answer = admin.post("/v1/banks", **body)
    assert answer.status_code == 400
    problem(answer)


@pytest.mark.parametrize("kind", ["application/json", "application/octet-stream", ""])
def test_an_upload_that_is_no_form(admin, kind):
    answer = admin.post("/v1/banks", content=b"{}", headers={"Content-Type": kind})
    assert answer.status_code == 415
    assert "curl -F info=@bank.json -F plugins=@plugins.safetensors" in problem(answer)


def test_a_bank_that_is_too_large(admin, store):
    answer = admin.post("/v1/banks", files={"info": b"{}", "plugins": bytes(MAX_BYTES)})
    assert answer.status_code == 413
    assert "larger than the 500,000 bytes" in problem(answer)
    assert not store.root.exists()


def test_a_description_that_is_too_large(admin, make_bank, monkeypatch):
    monkeypatch.setattr(bank_routes, "MAX_INFO_BYTES", 100)
    answer = admin.post("/v1/banks", files=files(make_bank()))
    assert answer.status_code == 413
    assert "bank.json is larger than the 100 bytes" in problem(answer)


def test_a_store_that_cannot_be_written(admin, store, make_bank, caplog):
    store.root.write_text("a file where the folder should be")
    answer = admin.post("/v1/banks", files=files(make_bank()))
    assert answer.status_code == 507
    assert "the store cannot be written: " in problem(answer)
    assert str(store.root) not in problem(answer)
    assert str(store.root) in caplog.text


def test_without_the_key_a_body_is_not_even_read(app):
    body = {"type": "http.request", "body": b"x", "more_body": False}
    headers = [("Content-Type", "multipart/form-data; boundary=b")]
    status, _, unread = call(app, body, path="/v1/banks", headers=headers)
    assert status == 401
    assert unread == [body]


def test_every_route_wants_the_key(admin):
    del admin.headers["Authorization"]
    operations = [
        (method, path.format(name="tiny", bank="tiny"))
        for path, methods in admin.app.openapi()["paths"].items()
        for method in methods
    ]
    assert len(operations) == 6
    for method, path in operations:
        body = {"json": {"bank": "tiny"}} if method == "put" else {}
        assert admin.request(method, path, **body).status_code == 401


# What is attached


def test_a_bank_is_attached(admin, registry, served, make_bank, swaps):
    bank = make_bank()
    admin.post("/v1/banks", files=files(bank))
    answer = attach(admin, "tiny", bank.info.digest[:8])
    assert answer.status_code == 200
    assert answer.json() == {
        "model": "tiny",
        "old_digest": served.bank.info.digest,
        "new_digest": bank.info.digest,
        "max_rate": MAX_RATE,
        "warning": None,
    }
    assert registry.get("tiny").bank.info == bank.info
    assert registry.get("tiny").backbone is served.backbone
    assert registry.get("bare").bank is None
    assert listed(admin)["new"]["models"] == ["tiny"]
    assert swaps == ["ok"]


def test_its_weights_are_folded_before_it_is_seen(admin, registry, store, make_bank, monkeypatch):
    store.publish(make_bank())
    attach(admin, "bare", "new")  # bare was tuned at rate 2
    monkeypatch.setattr(models, "fold", None)
    for rate in range(MAX_RATE + 1):
        assert registry.get("bare").at(rate, True)(torch.rand(1, 3, 64, 64))


def test_attaching_what_is_attached_changes_nothing(admin, registry, served, swaps):
    answer = attach(admin, "tiny", "tiny").json()
    assert answer["old_digest"] == answer["new_digest"] == served.bank.info.digest
    assert registry.get("tiny") is served
    assert swaps == []


def test_a_model_goes_without_a_bank_and_back_to_its_own(admin, registry, served):
    digest = served.bank.info.digest
    gone = admin.delete("/v1/models/tiny/bank").json()
    assert (gone["old_digest"], gone["new_digest"]) == (digest, None)
    assert registry.get("tiny").bank is None
    assert admin.delete("/v1/models/tiny/bank").json()["old_digest"] is None
    back = attach(admin, "tiny", digest).json()
    assert (back["old_digest"], back["new_digest"]) == (None, digest)
    assert registry.get("tiny").bank.info == served.bank.info


def test_a_bank_of_other_weights_is_attached_with_a_warning(admin, store, make_bank):
    store.publish(make_bank(digest="0" * 64))
    assert "was distilled on other weights" in attach(admin, "tiny", "new").json()["warning"]


@pytest.mark.parametrize(
    ("model", "changes", "message"),
    [
        ("tiny", {"geometry": NARROW}, "does not fit .*: width 384 (model: 192)"),
        ("bare", {"max_rate": 1}, "source rate must be in 0..1, got 2"),
    ],
)
def test_a_bank_that_does_not_fit(
    admin, registry, store, make_bank, swaps, model, changes, message
):
    store.publish(make_bank(**changes))
    before = registry.all()
    answer = attach(admin, model, "new")
    assert answer.status_code == 422
    assert re.search(message.replace("(", r"\(").replace(")", r"\)"), problem(answer))
    assert registry.all() == before
    assert swaps == ["failed"]


def test_a_bank_that_was_damaged_in_the_store(admin, registry, store, served, make_bank):
    store.publish(make_bank())
    (store.find("new").folder / "plugins.safetensors").write_bytes(b"")
    answer = attach(admin, "tiny", "new")
    assert answer.status_code == 422
    assert "truncated or corrupted" in problem(answer)
    assert registry.get("tiny") is served


def test_a_failure_in_the_middle_keeps_the_old_bank(
    admin, registry, store, served, make_bank, swaps, monkeypatch
):
    store.publish(make_bank())
    calls = []

    def full(model, delta):
        calls.append(delta)
        if len(calls) == 3:
            raise RuntimeError("out of memory")
        return fold(model, delta)

    monkeypatch.setattr(models, "fold", full)
    assert attach(admin, "tiny", "new").status_code == 500
    assert registry.get("tiny") is served
    assert attach(admin, "tiny", "new").status_code == 200
    assert swaps == ["failed", "ok"]


@pytest.mark.parametrize("method", ["put", "delete"])
def test_no_such_model(admin, method):
    body = {"json": {"bank": "tiny"}} if method == "put" else {}
    answer = admin.request(method, "/v1/models/nix/bank", **body)
    assert answer.status_code == 404
    assert "there are: tiny, bare" in problem(answer)


@pytest.mark.parametrize("choice", [{}, {"bank": 3}, {"bank": "tiny", "rate": 3}, []])
def test_a_choice_that_is_none(admin, choice):
    answer = admin.put("/v1/models/tiny/bank", json=choice)
    assert answer.status_code == 422
    problem(answer)


# What is deleted


def test_a_bank_is_deleted_once_nobody_uses_it(admin, store, make_bank):
    store.publish(make_bank())
    attach(admin, "tiny", "new")
    attach(admin, "bare", "new")
    answer = admin.delete("/v1/banks/new")
    assert answer.status_code == 409
    assert "is in use by tiny, bare" in problem(answer)
    for model in ("tiny", "bare"):
        admin.delete(f"/v1/models/{model}/bank")
    assert admin.delete("/v1/banks/new").status_code == 204
    assert store.versions() == []
    assert admin.delete("/v1/banks/new").status_code == 404


@pytest.mark.parametrize(
    ("bank", "origin"), [("deit_tiny_patch16_224-tome", "bundled"), ("tiny", "configuration")]
)
def test_what_is_not_the_stores_stays(admin, bank, origin):
    admin.delete("/v1/models/tiny/bank")
    answer = admin.delete(f"/v1/banks/{bank}")
    assert answer.status_code == 409
    assert f"({origin}): it stays" in problem(answer)
    assert bank in listed(admin)


def test_a_version_that_its_name_stands_for_outlasts_the_others(admin, store, make_bank):
    for seed in (1, 2):
        store.publish(make_bank(seed))
    answer = admin.delete("/v1/banks/new")
    assert answer.status_code == 409
    assert "publish another version first" in problem(answer)
    assert admin.delete(f"/v1/banks/{make_bank(1).info.digest}").status_code == 204
    assert admin.delete("/v1/banks/new").status_code == 204


def test_a_bank_that_another_process_reads_stays(admin, store, make_bank):
    with store.use(store.publish(make_bank())):
        answer = admin.delete("/v1/banks/new")
    assert answer.status_code == 409
    assert "is in use and stays" in problem(answer)


# While serving


def test_a_hundred_changes_leave_no_handles_behind(registry, store, make_bank, monkeypatch):
    banks = Banks(registry, store)
    for seed in (1, 2):
        store.publish(make_bank(seed, name=f"bank{seed}"))
    store.publish(make_bank(name="misfit", geometry=NARROW))
    handles = []
    with_bank, folds = ServedModel.with_bank, itertools.count(1)

    def watched(self, bank):
        handle = with_bank(self, bank)
        handles.append(weakref.ref(handle))
        return handle

    def failing(model, delta):
        if next(folds) % 17 == 0:
            raise RuntimeError("out of memory")
        return fold(model, delta)

    monkeypatch.setattr(ServedModel, "with_bank", watched)
    monkeypatch.setattr(models, "fold", failing)
    failed = 0
    gc.collect()
    gc.disable()  # nothing may be left that only the collector would find
    try:
        for i in range(100):
            name = "misfit" if i % 5 == 4 else f"bank{1 + i % 2}"
            try:
                banks.attach("tiny", name)
            except (UnusableBankError, RuntimeError):
                failed += 1
        assert 20 < failed < 60
        assert [handle() for handle in handles if handle()] == [registry.get("tiny")]
    finally:
        gc.enable()


def test_changes_come_one_after_the_other(registry, store, served, make_bank):
    banks = Banks(registry, store)
    for seed in range(3):
        store.publish(make_bank(seed, name=f"bank{seed}"))
    with ThreadPoolExecutor(4) as pool:
        changes = list(pool.map(lambda i: banks.attach("tiny", f"bank{i % 3}"), range(24)))
    # Each began where another ended: together they are one path.
    begun = [change.old for change in changes] + [registry.get("tiny").bank.info.digest]
    ended = [served.bank.info.digest] + [change.model.bank.info.digest for change in changes]
    assert sorted(begun) == sorted(ended)


def test_no_answer_is_a_mixture(admin, registry, served, make_bank):
    """Images at mixed rates while banks change: each answer is that of the bank it names."""
    known = {bank.info.digest: bank for bank in (served.bank, make_bank(1), make_bank(2, "other"))}
    for bank in known.values():
        admin.post("/v1/banks", files=files(bank))
    images = torch.rand(8, 3, 64, 64, generator=torch.Generator().manual_seed(5))
    engine = Engine(max_batch=4, max_queue=1000)
    engine.start()

    def ask(i: int):
        work = registry.get("tiny").at(i % (MAX_RATE + 1), compensate=True)
        return engine.submit(work, partial(images.__getitem__, i % 8), deadline=math.inf)

    futures = []
    for i in range(24):
        futures += [ask(8 * i + j) for j in range(8)]
        assert attach(admin, "tiny", list(known)[i % 3]).status_code == 200
    answers = [future.result() for future in futures]
    engine.stop()

    model, seen = served.backbone.model, set()
    for i, answer in enumerate(answers):
        digest, rate = answer.work.model.bank.info.digest, i % (MAX_RATE + 1)
        seen.add(digest)
        assert answer.work.rate == rate
        delta = compose(known[digest], 0, rate)
        expected = forward(model, images[i % 8][None], rate, delta)[0]
        torch.testing.assert_close(answer.output.logits, expected, atol=1e-3, rtol=1e-3)
    assert seen == known.keys()
