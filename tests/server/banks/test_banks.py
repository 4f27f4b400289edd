"""Banks while serving: what is listed, uploaded, found and refused."""

import errno
import io
import json
import math
import shutil
import tempfile
import zipfile

import pytest
import torch
from safetensors.torch import save
from starlette.formparsers import MultiPartParser

from adapters import Bank, open_bank
from server.banks import routes as bank_routes
from tests.server.banks.conftest import MAX_BYTES, attach, files, listed
from tests.server.conftest import MAX_RATE, call, problem


def test_banks_that_are_served_and_bundled_are_listed(admin, served):
    found = listed(admin)
    assert list(found) == ["deit_tiny-half", "tiny"]
    assert found["deit_tiny-half"]["origin"] == "bundled"
    assert found["tiny"] == {
        "name": "tiny",
        "digest": served.bank.info.digest,
        "origin": "configuration",
        "ladder": "tome",
        "method": "tome",
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


@pytest.mark.parametrize(("file", "status"), [("plugins.safetensors", 200), ("bank.json", 201)])
def test_uploading_it_again_repairs_a_damaged_copy(admin, store, make_bank, file, status):
    bank = make_bank()
    (store.find(store.publish(bank)).folder / file).write_bytes(b"damaged")
    assert admin.post("/v1/banks", files=files(bank)).status_code == status
    assert store.verify() == {}
    assert store.get("new").info == bank.info


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


def test_a_name_stands_for_the_published_one_of_configured_and_bundled_ones(admin, make_bank):
    for name in ("tiny", "deit_tiny-half"):
        bank = make_bank(name=name)
        assert admin.post("/v1/banks", files=files(bank)).status_code == 201
        assert admin.get(f"/v1/banks/{name}").json()["digest"] == bank.info.digest
    assert admin.delete("/v1/banks/tiny").status_code == 204
    assert admin.get("/v1/banks/tiny").json()["origin"] == "configuration"


def test_a_bundled_bank_that_was_published_is_deleted_again(admin, store):
    store.publish(open_bank("bundled:deit_tiny_bank"))
    assert listed(admin)["deit_tiny-half"]["origin"] == "store"
    assert admin.delete("/v1/banks/deit_tiny-half").status_code == 204
    assert listed(admin)["deit_tiny-half"]["origin"] == "bundled"


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
        ("huge", "max_rate must be at most 16, the patches of a picture, got 1073741824"),
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


def test_an_upload_for_which_the_disk_has_no_room(admin, make_bank, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(MultiPartParser, "spool_max_size", 1)  # larger parts go to the disk
    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    answer = admin.post("/v1/banks", files=files(make_bank()))
    assert answer.status_code == 507
    assert problem(answer) == "the upload cannot be kept: No space left on device"


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


def test_a_bank_whose_name_looks_like_digits_is_reached_by_it(admin, make_bank):
    bank = make_bank(name="deadbeef")
    assert admin.post("/v1/banks", files=files(bank)).status_code == 201
    found = admin.get("/v1/banks/deadbeef")
    assert found.status_code == 200, found.text
    assert found.json()["digest"] == bank.info.digest
