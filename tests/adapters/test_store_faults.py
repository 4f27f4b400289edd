"""The store when something breaks: crashes, full disks and damaged versions."""

import os
from pathlib import Path

import pytest

from adapters import Store
from adapters import store as store_module
from adapters.durable import replace_file
from tests.adapters.banks import random_bank, same
from tests.adapters.test_store import python
from tocom import StoreError

OLD, NEW = random_bank(seed=1), random_bank(seed=2)


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "store")


# Ends the process at the n-th time that it asks the system to change or open a file, for each n
# until the publication is done before that.
CRASHES = """
import os, sys
from pathlib import Path
from adapters import Bank, Store

folder, old, new = Path(sys.argv[1]), Bank.load(sys.argv[2]), Bank.load(sys.argv[3])
events = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "fcntl.flock"}

def crash_at(n):
    left = [n]
    def hook(event, arguments):
        left[0] -= event in events
        if left[0] == 0:
            os._exit(9)
    sys.addaudithook(hook)

code, n = 9, 0
while code:
    n += 1
    store = Store(folder / str(n))
    store.publish(old)
    process = os.fork()
    if process == 0:
        crash_at(n)
        store.publish(new)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    assert code in (0, 9), code
print(n)
"""


def test_a_crash_at_any_point_leaves_a_whole_store(tmp_path):
    folders = [bank.save(tmp_path / bank.info.digest) for bank in (OLD, NEW)]
    with python(CRASHES, tmp_path / "stores", *folders) as crashes:
        points = int(crashes.stdout.read())
    assert points > 12
    current, leftovers = [], 0
    for n in range(1, points + 1):
        store = Store(tmp_path / "stores" / str(n))
        assert store.verify() == {}
        assert same(store.get(f"tiny@{OLD.info.digest}"), OLD)
        current.append(store.get("tiny").info.digest)
        leftovers += len(list(store.root.rglob(".*")))

        store.publish(NEW)
        assert same(store.get("tiny"), NEW)
        assert list(store.root.rglob(".*")) == []
    assert leftovers > 5
    assert current[0] == OLD.info.digest
    assert current[-1] == NEW.info.digest
    assert sorted(current, key=[OLD.info.digest, NEW.info.digest].index) == current


def test_a_crash_while_deleting_is_cleaned_up(store, monkeypatch):
    store.publish(OLD)

    def fail(folder, ignore_errors):
        raise OSError("power cut")

    with monkeypatch.context() as broken:
        broken.setattr(store_module.shutil, "rmtree", fail)
        with pytest.raises(OSError, match="power cut"):
            store.delete("tiny")
    assert store.versions() == []
    store.publish(OLD)
    assert same(store.get("tiny"), OLD)
    assert list(store.root.rglob(".*")) == []


def test_a_version_that_is_a_link_does_not_stay_in_the_way(store, tmp_path):
    store.publish(OLD)
    version = store.find("tiny").folder
    version.rename(tmp_path / "elsewhere").joinpath("more").mkdir()
    version.symlink_to(tmp_path / "elsewhere")
    store.delete("tiny")
    assert (tmp_path / "elsewhere/bank.json").exists()
    version.with_name(".left").symlink_to(tmp_path / "elsewhere")
    store.publish(OLD)
    assert list(store.root.rglob(".*")) == []


def test_what_cannot_be_removed_does_not_stop_a_publication(store, monkeypatch):
    store.publish(OLD)
    left = store.find("tiny").folder.with_name(".left")
    (left / "inner").mkdir(parents=True)

    def busy(*_, **__):
        raise OSError("busy")

    with monkeypatch.context() as broken:
        broken.setattr(os, "rmdir", busy)
        store.publish(OLD)
    assert left.exists()
    store.publish(OLD)
    assert not left.exists()


def test_a_current_file_that_is_no_text_names_no_version(store):
    store.publish(OLD)
    (store.root / "banks/tiny/current").write_bytes(b"\xff\xfe")
    assert store.verify().keys() == {"tiny"}
    store.publish(OLD)
    assert same(store.get("tiny"), OLD)


def test_a_full_disk_leaves_the_old_version(store, monkeypatch):
    store.publish(OLD)

    def full(descriptor):
        raise OSError("No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            store.publish(NEW)
    assert same(store.get("tiny"), OLD)
    assert len(store.versions()) == 1


def test_a_file_that_cannot_be_replaced_leaves_nothing_beside_it(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        replace_file(tmp_path / "current", "new")
    assert list(tmp_path.iterdir()) == []


def damage(folder: Path, how: str) -> None:
    match how:
        case "tensors":
            file = folder / "plugins.safetensors"
            file.write_bytes(file.read_bytes()[:-1] + b"\x00")
        case "description":
            (folder / "bank.json").write_text("{")
        case "empty":
            for file in folder.iterdir():
                file.unlink()
        case "another":
            for file in NEW.save(folder.parent.parent / "new").iterdir():
                file.replace(folder / file.name)


@pytest.mark.parametrize("how", ["tensors", "description", "empty", "another"])
def test_publishing_a_whole_bank_repairs_a_damaged_version(store, how):
    reference = store.publish(OLD)
    damage(store.find("tiny").folder, how)
    assert store.verify().keys() == {reference}
    assert store.publish(OLD) == reference
    assert same(store.get("tiny"), OLD)
    assert store.verify() == {}
    assert list(store.root.rglob(".*")) == []


def test_a_repair_that_stops_between_two_files_is_taken_up_again(store, monkeypatch):
    store.publish(OLD)
    folder = store.find("tiny").folder
    damage(folder, "empty")
    replace = Path.replace

    def fail(path, target):
        if target == folder / "plugins.safetensors":
            raise OSError("power cut")
        return replace(path, target)

    with monkeypatch.context() as broken:
        broken.setattr(Path, "replace", fail)
        with pytest.raises(OSError, match="power cut"):
            store.publish(OLD)
    assert store.verify().keys() == {store.find("tiny").reference}
    store.publish(OLD)
    assert same(store.get("tiny"), OLD)
    assert list(store.root.rglob(".*")) == []


def test_a_full_disk_leaves_a_damaged_version_as_it_was(store, monkeypatch):
    store.publish(OLD)
    damage(store.find("tiny").folder, "tensors")
    faults = store.verify()

    def full(descriptor):
        raise OSError("No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            store.publish(OLD)
    assert store.verify() == faults


def test_what_is_in_use_while_it_is_repaired_stays(store):
    reference = store.publish(OLD)
    with store.use("tiny"):
        damage(store.find("tiny").folder, "tensors")
        store.publish(OLD)
        with pytest.raises(StoreError, match=f"{reference} is in use"):
            store.delete("tiny")
