"""A directory of published banks.

Layout: `banks/NAME/DIGEST/` is a version, a bank folder that never changes; the file
`banks/NAME/current` holds the digest that NAME alone stands for. Changes are serialised by
a lock on `banks/`, use is shown by a lock on the version's folder; the kernel holds both, so
they end with their process, however it ends. Locks on folders want a local file system.

Does not know other things that may be published: they get a room beside `banks/`.
"""

import fcntl
import os
import re
import shutil
from collections.abc import Container, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from adapters import hub
from adapters.bank import FILES, Bank
from adapters.durable import replace_file, sync
from adapters.schema import NAME
from tocom import BankError, StoreError, bundled_folder
from tocom.backbones import BUNDLED

_CURRENT = "current"
_VERSION = re.compile(rf"({NAME})/([0-9a-f]{{64}})")
_REFERENCE = re.compile(rf"({NAME})(?:@([0-9a-f]{{4,64}}))?")
_DIGITS = re.compile("[0-9a-f]{8,64}")


@dataclass(frozen=True)
class Reference:
    """How a bank is asked for: `NAME`, `NAME@DIGEST` or `DIGEST`.

    Attributes:
        name: the bank's; None: whatever it is called.
        digits: what its digest begins with; empty: the name's current version is meant.
    """

    name: str | None
    digits: str = ""

    @classmethod
    def parse(cls, text: str, names: Container[str]) -> "Reference":
        """Read a reference.

        Args:
            text: a name, alone or with `@` and four digits of a digest or more; or eight digits or
                more. All 64 of them are always a digest.
            names: of the banks that there are. Fewer digits are a name if a bank is called so.

        Raises:
            StoreError: if it has another form.
        """
        match = _REFERENCE.fullmatch(text)
        if match is None:
            raise StoreError(
                "a reference is NAME, NAME@DIGEST (4 digits or more) or DIGEST (8 or more), "
                f"got {text!r}"
            )
        if _DIGITS.fullmatch(text) and (len(text) == 64 or text not in names):
            return cls(None, text)
        return cls(match[1], match[2] or "")

    def fits(self, name: str, digest: str, current: bool) -> bool:
        """Tell whether it means a bank, which may be what its name alone stands for."""
        return self.name in (None, name) and (
            digest.startswith(self.digits) if self.digits else current
        )

    def __str__(self) -> str:
        return "@".join(filter(None, (self.name, self.digits)))


@dataclass(frozen=True)
class Version:
    """One published bank.

    Attributes:
        name: the bank's name.
        digest: all 64 digits of it.
        folder: where it is.
        current: whether the name alone stands for this version.
    """

    name: str
    digest: str
    folder: Path
    current: bool

    @property
    def reference(self) -> str:
        """How to ask for it: `NAME@DIGEST`, twelve digits of it."""
        return f"{self.name}@{self.digest[:12]}"


class Store:
    """A store of banks; nothing is made on disk before the first `publish`."""

    def __init__(self, root: str | Path | None = None) -> None:
        """Open a store.

        Args:
            root: its folder; by default `$TOCOM_STORE`, or `~/.local/share/tocom/store`.
        """
        default = os.environ.get("TOCOM_STORE") or "~/.local/share/tocom/store"
        self.root = Path(default if root is None else root).expanduser()
        self._banks = self.root / "banks"

    def publish(self, bank: Bank | str | Path) -> str:
        """Add a bank, or a bank folder, and make it what its name stands for.

        A version that is there already stays as it is, its notes (training, evaluation)
        included, unless it is damaged: then it is replaced. A crash leaves what was published
        before whole and in its place.

        Returns:
            The reference `NAME@DIGEST`.

        Raises:
            BankError: if the folder is faulty.
        """
        if not isinstance(bank, Bank):
            bank = Bank.load(bank)
        name, digest = bank.info.name, bank.info.digest
        version = Version(name, digest, self._banks / name / digest, current=True)
        self._banks.mkdir(parents=True, exist_ok=True)
        with self._changing():
            if not version.folder.exists():
                bank.save(version.folder)
                sync(self._banks)
            elif _fault(version):
                _repair(version, bank)
            if self._current(name) != digest:
                replace_file(version.folder.parent / _CURRENT, f"{digest}\n")
        return version.reference

    def get(self, reference: str | Reference) -> Bank:
        """Read a bank by its reference, such as `NAME`, its current version.

        Raises:
            StoreError: if there is none, or more than one; naming what there is.
            BankError: if what is stored is faulty.
        """
        with self.use(reference) as bank:
            return bank

    @contextmanager
    def use(self, reference: str | Reference) -> Iterator[Bank]:
        """Read a bank as `get` does; while the context lasts, no process can delete it."""
        with ExitStack() as lease:
            # A deletion holds this lock, so none comes between finding and locking.
            with self._lock(fcntl.LOCK_SH):
                version = self.find(reference)
                lease.enter_context(_flock(version.folder, fcntl.LOCK_SH))
            yield _load(version)

    def find(self, reference: str | Reference) -> Version:
        """Return the version that a reference names, unread.

        Raises:
            StoreError: if there is none, or more than one; naming what there is.
        """
        versions = self.versions()
        if isinstance(reference, str):
            reference = Reference.parse(reference, {version.name for version in versions})
        found = [v for v in versions if reference.fits(v.name, v.digest, v.current)]
        if len(found) == 1:
            return found[0]
        if found:
            them = ", ".join(f"{version.name}@{version.digest}" for version in found)
            raise StoreError(f"'{reference}' fits {len(found)} versions; say which of {them}")
        if known := [version.reference for version in versions if version.name == reference.name]:
            raise StoreError(f"'{reference}' fits 0 versions; there is: {', '.join(known)}")
        names = ", ".join(sorted({version.name for version in versions})) or "nothing"
        raise StoreError(f"no bank '{reference}' in {self.root}; there is: {names}")

    def versions(self) -> list[Version]:
        """Return all that is published, by name and digest, unread."""
        found = []
        for folder in sorted(self._banks.glob("*/*")):
            if match := _VERSION.fullmatch(folder.relative_to(self._banks).as_posix()):
                name, digest = match.groups()
                found.append(Version(name, digest, folder, digest == self._current(name)))
        return found

    def verify(self) -> dict[str, str]:
        """Read and hash everything again.

        Returns:
            What is wrong, by reference; empty if all is whole.
        """
        with self._lock(fcntl.LOCK_SH):
            versions = self.versions()
            faults = {v.reference: fault for v in versions if (fault := _fault(v))}
            for name in sorted({version.name for version in versions}):
                if not any(version.current for version in versions if version.name == name):
                    faults[name] = "no version is the current one; publish one of them again"
        return faults

    def delete(self, reference: str | Reference) -> str:
        """Remove a version.

        Returns:
            The reference `NAME@DIGEST` of what is gone.

        Raises:
            StoreError: if there is none, if it is in use, or if it is the current version of a
                name that has others.
        """
        with self._changing():
            version = self.find(reference)
            others = [v for v in self.versions() if v.name == version.name and v != version]
            if version.current and others:
                raise StoreError(
                    f"{version.reference} is what {version.name!r} stands for: publish another "
                    f"version first, such as {others[0].reference}"
                )
            doomed = version.folder.with_name(f".{version.digest}.deleted")
            try:
                with _flock(version.folder, fcntl.LOCK_EX | fcntl.LOCK_NB):
                    if version.current:
                        (version.folder.parent / _CURRENT).unlink()
                    version.folder.rename(doomed)
            except BlockingIOError:
                raise StoreError(f"{version.reference} is in use and stays") from None
            sync(doomed.parent)
            _remove(doomed)
        return version.reference

    def _current(self, name: str) -> str:
        try:  # a file that was damaged names no version
            file = self._banks / name / _CURRENT
            return file.read_text(encoding="utf-8", errors="replace").strip()
        except FileNotFoundError:
            return ""

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """Be the only one who changes the store; first clean what a crash left behind."""
        with self._lock(fcntl.LOCK_EX):
            for leftover in self._banks.glob("*/.*"):
                _remove(leftover)
            yield

    @contextmanager
    def _lock(self, mode: int) -> Iterator[None]:
        if not self._banks.is_dir():
            raise StoreError(f"nothing is published in {self.root}")
        with _flock(self._banks, mode):
            yield


def open_bank(reference: str | Path, store: Store | None = None) -> Bank:
    """Read a bank from wherever it is.

    Args:
        reference: a bank folder; `bundled:NAME`, in this package; `hf://ORG/NAME[@REVISION]`, on
            the Hugging Face Hub or in its cache; or what `Store.get` takes. A folder wins over a
            published bank of the same name.
        store: where references are looked up; by default the store of `Store()`.

    Raises:
        BackboneError: if nothing bundled has the name.
        BankError: if the folder is no bank or a faulty one, or the hub's cannot be had.
        StoreError: if the store has no such bank.
    """
    with use_bank(reference, store) as bank:
        return bank


@contextmanager
def use_bank(reference: str | Path, store: Store | None = None) -> Iterator[Bank]:
    """Read a bank as `open_bank` does; a published one cannot be deleted meanwhile."""
    text = str(reference)
    if text.startswith(BUNDLED):
        yield Bank.load(bundled_folder(text.removeprefix(BUNDLED)))
    elif text.startswith(hub.SCHEME):
        repo_id, revision = hub.parse(text)
        yield hub.pull_bank(repo_id, revision=revision)
    elif isinstance(reference, Path) or os.sep in text or Path(text).is_dir():
        yield Bank.load(text)
    else:
        with (store or Store()).use(text) as bank:
            yield bank


def _load(version: Version) -> Bank:
    bank = Bank.load(version.folder)
    if (bank.info.name, bank.info.digest) != (version.name, version.digest):
        raise BankError(
            f"{version.folder} holds {bank.info.name}@{bank.info.digest[:12]}, "
            "which does not belong there"
        )
    return bank


def _fault(version: Version) -> str:
    try:
        _load(version)
    except BankError as error:
        return str(error)
    return ""


def _repair(version: Version, bank: Bank) -> None:
    """Replace the files of a damaged version; the folder stays, with the locks on it."""
    whole = bank.save(version.folder.with_name(f".{version.digest}.whole"))
    for name in FILES:  # each by itself is no worse than what was there
        (whole / name).replace(version.folder / name)
    sync(version.folder)
    whole.rmdir()


def _remove(path: Path) -> None:
    """Remove a hidden file or folder; what cannot be removed waits for the next change."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink()


@contextmanager
def _flock(folder: Path, mode: int) -> Iterator[None]:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, mode)
        yield
    finally:
        os.close(descriptor)
