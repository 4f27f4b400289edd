"""Banks while serving: which there are, which model is served with which, and how that changes.

A change never touches a handle: it makes a new one, warms it, and lets it take the old one's
place. What runs on the old one ends on it; what fails before that leaves the old one in place.
The configuration is not changed: a server that starts again serves what it says.

Everything here blocks and belongs into a thread. Knows nothing of HTTP.
"""

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

from adapters import Bank, BankInfo, Store, use_bank
from adapters.bank import FILES, read_info
from adapters.store import Reference
from server.errors import (
    ConflictError,
    ParameterError,
    StoreFaultError,
    UnknownBankError,
    UnusableBankError,
)
from server.models.registry import Registry
from server.models.served import ServedModel
from tocom import BankError, ConfigError, StoreError
from tocom.allocator import return_freed_memory
from tocom.backbones import bundled_folders

logger = logging.getLogger(__name__)

Origin = Literal["bundled", "store", "configuration"]


@dataclass(frozen=True)
class Known:
    """A bank that models can be served with.

    Attributes:
        info: what its `bank.json` says; of a stored one its tensors may still be faulty.
        origin: `bundled` with the package, in the `store`, or named by the `configuration` as
            something else (a folder, the hub); of these the store's can be deleted.
        use: reads it, whole and strictly; while the context lasts, no process deletes it.
        current: whether its name alone stands for it.
    """

    info: BankInfo
    origin: Origin
    use: Callable[[], AbstractContextManager[Bank]]
    current: bool = True

    @property
    def reference(self) -> str:
        """How to ask for it: `NAME@DIGEST`, twelve digits of it."""
        return f"{self.info.name}@{self.info.digest[:12]}"

    def fits(self, reference: Reference) -> bool:
        """Tell whether a reference may mean it."""
        return reference.fits(self.info.name, self.info.digest, self.current)


@dataclass(frozen=True)
class Change:
    """What became of a model's bank.

    Attributes:
        old: digest of the bank before; None: there was none.
        model: the handle that serves from now on.
    """

    old: str | None
    model: ServedModel


class Banks:
    """The banks of a server. Changes come one after the other, from whatever thread."""

    def __init__(
        self,
        models: Registry,
        store: Store,
        swapped: Callable[[str], None] | None = None,
    ) -> None:
        """Look after the banks of served models.

        Args:
            models: what is served. The banks that they begin with are kept, so that one can
                always go back to them.
            store: where uploaded banks go.
            swapped: is told of each change, or try, whether it was `ok` or `failed`.
        """
        self._models = models
        self._store = store
        self._swapped = swapped
        self._configured = [model.repaired.bank for model in models.all() if model.repaired.bank]
        self._changing = threading.Lock()
        # By model: what keeps other processes from deleting the bank that it is served with.
        self._leases = {model.name: self._lease(model.repaired.bank) for model in models.all()}

    def all(self) -> list[Known]:
        """Return every bank that can be attached, by name and digest."""
        found = {}
        for bank in self._configured:
            found[bank.info.digest] = Known(bank.info, "configuration", partial(_same, bank))
        for folder in bundled_folders():
            if (folder / FILES[0]).exists() and (info := _read(folder)):
                found[info.digest] = Known(info, "bundled", partial(use_bank, folder))
        published = set()
        for version in self._store.versions():
            if info := _read(version.folder):
                use = partial(self._store.use, f"{version.name}@{version.digest}")
                found[version.digest] = Known(info, "store", use, version.current)
                if version.current:
                    published.add(version.name)
        for digest, known in found.items():
            if known.origin != "store" and known.info.name in published:
                found[digest] = replace(known, current=False)
        return sorted(found.values(), key=lambda bank: (bank.info.name, bank.info.digest))

    def find(self, reference: str) -> Known:
        """Return the bank that a reference means.

        Args:
            reference: eight or more digits of a digest, `NAME` or `NAME@DIGEST`.

        Raises:
            UnknownBankError: if there is none.
            ParameterError: if there are several.
        """
        shown = reference[:200]
        banks = self.all()
        try:
            parsed = Reference.parse(reference, {bank.info.name for bank in banks})
        except StoreError:
            fitting = []
        else:
            fitting = [bank for bank in banks if bank.fits(parsed)]
        if not fitting:
            raise UnknownBankError(
                f"no bank is {shown!r}; say 8 or more digits of a digest, NAME or NAME@DIGEST; "
                "GET /v1/banks lists what there is"
            )
        if len(fitting) > 1:
            them = ", ".join(f"{bank.info.name}@{bank.info.digest}" for bank in fitting)
            raise ParameterError(f"{shown!r} means {len(fitting)} banks; say which of {them}")
        return fitting[0]

    def users(self, digest: str) -> list[str]:
        """Return the names of the models that are served with a bank."""
        return [model.name for model in self._models.all() if model.repaired.bank_digest == digest]

    def add(self, info: bytes, plugins: bytes) -> tuple[Known, bool]:
        """Publish a bank in the store, once it is found to be whole.

        Args:
            info: content of `bank.json`.
            plugins: content of `plugins.safetensors`.

        Returns:
            The bank, and whether it is new here.

        Raises:
            UnusableBankError: naming the fault.
            StoreFaultError: if the store cannot be written.
        """
        try:
            bank = Bank.from_bytes(info, plugins)
            with self._changing, self._writing():
                new = all(bank.info.digest != known.info.digest for known in self.all())
                self._store.publish(bank)
                found = self.find(bank.info.digest)
        except BankError as error:
            raise UnusableBankError(str(error)) from error
        if new:
            logger.info("bank %s is published", found.reference)
        return found, new

    def delete(self, reference: str) -> None:
        """Remove a bank from the store.

        Raises:
            UnknownBankError, ParameterError: if the reference does not mean one bank.
            ConflictError: if it is in use, is not the store's to delete, or is what its name
                stands for while there are others of that name.
            StoreFaultError: if the store cannot be written.
        """
        with self._changing:
            bank = self.find(reference)
            if users := self.users(bank.info.digest):
                raise ConflictError(f"{bank.reference} is in use by {', '.join(users)}")
            if bank.origin != "store":
                raise ConflictError(
                    f"{bank.reference} is not in the store ({bank.origin}): it stays"
                )
            try:
                with self._writing():
                    self._store.delete(f"{bank.info.name}@{bank.info.digest}")
            except StoreError as error:
                raise ConflictError(str(error)) from error
        logger.info("bank %s is deleted", bank.reference)

    def attach(self, name: str, reference: str) -> Change:
        """Serve a model with a bank from now on.

        Raises:
            UnknownModelError: if no model has the name.
            UnknownBankError, ParameterError: if the reference does not mean one bank.
            UnusableBankError: if the bank is faulty or does not fit; the old one stays.
        """
        with self._changing:
            old = self._models.get(name)
            bank = self.find(reference)
            if bank.info.digest == old.repaired.bank_digest:
                return Change(bank.info.digest, old)
            return self._swap(old, bank.use)

    def detach(self, name: str) -> Change:
        """Serve a model without a bank from now on.

        Raises:
            UnknownModelError: if no model has the name.
            UnusableBankError: if it cannot be served without; the old one stays.
        """
        with self._changing:
            return self._swap(self._models.get(name), nullcontext)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            logger.error("the store %s cannot be written: %s", self._store.root, error)
            raise StoreFaultError(f"the store cannot be written: {error.strerror}") from error

    def _lease(self, bank: Bank | None) -> ExitStack:
        """Keep a bank from being deleted if the store has it; it serves from memory anyway."""
        lease = ExitStack()
        if bank is not None:
            with suppress(BankError, StoreError, OSError):
                lease.enter_context(self._store.use(f"{bank.info.name}@{bank.info.digest}"))
        return lease

    def _swap(
        self, old: ServedModel, use: Callable[[], AbstractContextManager[Bank | None]]
    ) -> Change:
        result, lease = "failed", ExitStack()
        try:
            new = old.with_bank(lease.enter_context(use()))
            # Before it is seen: no request shall wait for weights to be folded. High rates first,
            # as their deltas have the highest rank: if room ends, others run low-rank.
            repaired = new.repaired
            for rate in reversed(range(repaired.max_rate + 1)):
                if repaired.at(rate, compensate=True).compensate:
                    repaired.delta(rate)
            self._models.replace(new)
            self._leases[new.name], lease = lease, self._leases[new.name]
            result = "ok"
        except StoreError as error:  # gone since it was found
            raise UnknownBankError(str(error)) from error
        except (BankError, ConfigError) as error:
            raise UnusableBankError(str(error)) from error
        finally:
            lease.close()  # of the bank that serves no more, or never did
            # What earlier banks left: each change runs in another thread, whose part of the heap
            # would keep it. Of the last one requests may still run.
            return_freed_memory()
            if self._swapped:
                self._swapped(result)
        before, after = old.repaired.bank_digest, repaired.bank_digest
        logger.info("model %s: bank %s, before %s", new.name, after, before)
        return Change(before, new)


def _same(bank: Bank) -> AbstractContextManager[Bank]:
    return nullcontext(bank)


def _read(folder: Path) -> BankInfo | None:
    """Return what a folder says; one faulty bank must not hide the others."""
    try:
        return read_info(folder)
    except BankError as error:
        logger.warning("a bank is left out: %s", error)
        return None
