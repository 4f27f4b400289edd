"""The store: published whole, kept as it was, deleted only when nobody uses it."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from adapters import Bank, Store, open_bank, use_bank
from adapters import store as store_module
from adapters.store import Reference
from tests.adapters.banks import random_bank, same
from tocom import BackboneError, BankError, StoreError

OLD, NEW = random_bank(seed=1), random_bank(seed=2)
ROOT = Path(__file__).parents[2]


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "store")


def python(code: str, *arguments: object) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def test_what_is_published_comes_back(store, tmp_path):
    reference = store.publish(OLD)
    assert reference == f"tiny@{OLD.info.digest[:12]}"
    digest = OLD.info.digest
    for name in ("tiny", reference, f"tiny@{digest}", f"tiny@{digest[:4]}", digest, digest[:8]):
        assert same(store.get(name), OLD)
    assert store.publish(random_bank(name="other").save(tmp_path / "folder")).startswith("other@")
    assert [(version.name, version.current) for version in store.versions()] == [
        ("other", True),
        ("tiny", True),
    ]
    assert store.verify() == {}


def test_the_latest_published_is_current_and_the_others_stay(store):
    store.publish(OLD)
    store.publish(NEW)
    assert same(store.get("tiny"), NEW)
    assert same(store.get(f"tiny@{OLD.info.digest}"), OLD)
    store.publish(OLD)
    assert same(store.get("tiny"), OLD)
    assert len(store.versions()) == 2


def test_publishing_again_changes_nothing(store):
    store.publish(OLD)
    before = {path: path.stat().st_mtime_ns for path in store.root.rglob("*")}
    notes = OLD.info.model_copy(update={"training": {"other": "notes"}})
    store.publish(Bank(notes, OLD.tensors))
    assert {path: path.stat().st_mtime_ns for path in store.root.rglob("*")} == before


def test_a_faulty_folder_is_not_published(store, tmp_path):
    with pytest.raises(BankError, match="is no bank"):
        store.publish(tmp_path)
    assert not store.root.exists()


@pytest.mark.parametrize(
    "reference",
    ["", "..", "../tiny", "/tiny", "tiny/", "Tiny", "tiny\n", "tiny@", "tiny@abc", "tiny@../..",
     ".tiny", "tiny@ABCD", "tiny@" + "0" * 65, "a" * 101],
)  # fmt: skip
def test_tricks_with_names_are_refused(store, reference):
    store.publish(OLD)
    for act in (store.get, store.find, store.delete):
        with pytest.raises(StoreError, match="a reference is NAME, NAME@DIGEST .* got"):
            act(reference)


def test_what_is_not_there_is_named_with_what_is(store):
    with pytest.raises(StoreError, match="nothing is published in"):
        store.get("tiny")
    with pytest.raises(StoreError, match="no bank 'tiny' in .*; there is: nothing"):
        store.find("tiny")
    reference = store.publish(OLD)
    with pytest.raises(StoreError, match="no bank 'tin' in .*; there is: tiny$"):
        store.get("tin")
    with pytest.raises(StoreError, match=f"fits 0 versions; there is: {reference}"):
        store.get("tiny@0123456789")


def test_an_ambiguous_digest_is_refused(store, monkeypatch):
    store.publish(OLD)
    folder = store.find("tiny").folder
    twin = folder.with_name(folder.name[:12] + "0" * 52)
    folder.rename(folder.with_name(folder.name[:12] + "1" * 52))
    twin.mkdir()
    message = f"fits 2 versions; say which of tiny@{twin.name}, tiny@{folder.name[:12]}1"
    for reference in (f"tiny@{folder.name[:12]}", folder.name[:12]):
        with pytest.raises(StoreError, match=message):
            store.find(reference)


def test_a_name_wins_over_digits(store):
    store.publish(OLD)
    digits = OLD.info.digest[:8]
    namesake, deadbeef = random_bank(name=digits), random_bank(name="deadbeef")
    for bank in (namesake, deadbeef):
        store.publish(bank)
    assert same(store.get("deadbeef"), deadbeef)
    assert same(store.get(digits), namesake)
    assert same(store.get(OLD.info.digest[:9]), OLD)
    assert same(store.get(f"tiny@{digits}"), OLD)
    store.delete(digits)
    assert same(store.get(digits), OLD)


def test_all_digits_are_a_digest_whatever_banks_are_called(store):
    store.publish(OLD)
    namesake = random_bank(name=OLD.info.digest)
    reference = store.publish(namesake)
    assert same(store.get(OLD.info.digest), OLD)
    assert same(store.get(reference), namesake)


@pytest.mark.parametrize(
    ("text", "reference"),
    [
        ("tiny", Reference("tiny")),
        ("tiny@0123", Reference("tiny", "0123")),
        ("other", Reference("other")),
        ("01234567", Reference(None, "01234567")),
        ("0123456", Reference("0123456")),
        ("deadbeef", Reference("deadbeef")),
        ("deadbeef0", Reference(None, "deadbeef0")),
        ("deadbeef@0123", Reference("deadbeef", "0123")),
        ("0" * 64, Reference(None, "0" * 64)),
        ("0" * 65, Reference("0" * 65)),
    ],
)
def test_references_are_read_in_one_way(text, reference):
    assert Reference.parse(text, {"tiny", "deadbeef", "0" * 64}) == reference
    assert str(reference) == text


def test_what_has_been_read_is_not_read_again(store):
    store.publish(OLD)
    digit = OLD.info.digest[0]
    for reference in (Reference("tiny"), Reference("tiny", digit), Reference(None, digit)):
        assert store.find(reference).digest == OLD.info.digest
    assert not Reference("other", digit).fits("tiny", OLD.info.digest, current=True)
    assert not Reference("tiny").fits("tiny", OLD.info.digest, current=False)


def test_verify_reports_each_fault(store):
    store.publish(OLD)
    store.publish(NEW)
    store.publish(random_bank(name="moved"))
    store.publish(random_bank(name="lost"))
    bad, worse = store.find(f"tiny@{OLD.info.digest}"), store.find("tiny")
    path = bad.folder / "plugins.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x00")
    (worse.folder / "bank.json").unlink()
    moved = store.find("moved")
    moved = moved.folder.rename(moved.folder.with_name("0" * 64))
    (store.root / "banks/lost/current").unlink()
    faults = store.verify()
    assert faults.keys() == {
        bad.reference,
        worse.reference,
        "moved@000000000000",
        "moved",
        "lost",
    }
    assert "digest" in faults[bad.reference]
    assert "no bank.json" in faults[worse.reference]
    assert "does not belong there" in faults["moved@000000000000"]
    assert "publish one of them again" in faults["lost"]
    with pytest.raises(StoreError, match="'lost' fits 0 versions"):
        store.get("lost")


def test_deleting(store):
    old, new = store.publish(OLD), store.publish(NEW)
    with pytest.raises(StoreError, match=f"{new} is what 'tiny' stands for.*such as {old}"):
        store.delete("tiny")
    assert store.delete(old) == old
    assert [version.reference for version in store.versions()] == [new]
    assert store.delete("tiny") == new
    assert store.versions() == []
    store.publish(OLD)
    assert same(store.get("tiny"), OLD)


def test_what_is_in_use_stays(store):
    reference = store.publish(OLD)
    with store.use("tiny") as bank, store.use(reference):
        assert same(bank, OLD)
        with pytest.raises(StoreError, match=f"{reference} is in use"):
            store.delete("tiny")
        store.publish(NEW)  # others may come, and what is used stays readable
        assert same(store.get(reference), OLD)
    store.delete(reference)


def test_a_failing_user_lets_go(store):
    store.publish(OLD)
    with pytest.raises(ZeroDivisionError), store.use("tiny"):
        _ = 1 / 0
    store.delete("tiny")


USER = """
import sys
from adapters import Store
with Store(sys.argv[1]).use("tiny"):
    print("using", flush=True)
    sys.stdin.read()
"""


def test_use_holds_between_processes_and_ends_with_them(store):
    reference = store.publish(OLD)
    with python(USER, store.root) as user:
        assert user.stdout.readline() == "using\n"
        with pytest.raises(StoreError, match=f"{reference} is in use"):
            store.delete("tiny")
        user.send_signal(signal.SIGKILL)
    store.delete("tiny")
    assert store.versions() == []


def test_the_default_root(monkeypatch, tmp_path):
    monkeypatch.setenv("TOCOM_STORE", str(tmp_path))
    assert Store().root == tmp_path
    monkeypatch.delenv("TOCOM_STORE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Store().root == tmp_path / ".local/share/tocom/store"
    assert Store("~/banks").root == tmp_path / "banks"


def test_a_bank_opens_from_wherever_it_is(store, tmp_path, monkeypatch):
    folder = OLD.save(tmp_path / "tiny")
    reference = store.publish(NEW)
    assert same(open_bank(folder), OLD)
    assert same(open_bank(str(folder)), OLD)
    assert same(open_bank("tiny", store), NEW)
    assert same(open_bank(reference, store), NEW)
    monkeypatch.setenv("TOCOM_STORE", str(store.root))
    assert same(open_bank("tiny"), NEW)
    monkeypatch.chdir(tmp_path)
    assert same(open_bank("tiny"), OLD)
    monkeypatch.setattr(store_module, "bundled_folder", lambda name: tmp_path / name)
    assert same(open_bank("bundled:tiny"), OLD)


def test_what_cannot_be_opened_is_named(store, tmp_path):
    with pytest.raises(BankError, match=r"there is no folder .*nowhere"):
        open_bank(str(tmp_path / "nowhere"), store)
    with pytest.raises(BankError, match="there is no folder nowhere"):
        open_bank(Path("nowhere"), store)
    with pytest.raises(StoreError, match="nothing is published in"):
        open_bank("nowhere", store)
    with pytest.raises(BackboneError, match="nothing bundled is called 'nowhere'; there are: "):
        open_bank("bundled:nowhere", store)


def test_use_bank_keeps_a_published_bank(store):
    store.publish(OLD)
    with use_bank("tiny", store) as bank:
        assert same(bank, OLD)
        with pytest.raises(StoreError, match="is in use"):
            store.delete("tiny")
