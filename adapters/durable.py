"""Writing that survives a crash: whole or not at all, and still there after a power cut.

For POSIX systems: a rename within a file system is atomic, and a folder is synced like a
file. What a crash leaves behind is hidden (its name starts with a dot); who owns the folder
cleans it.
"""

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tocom import BankError, TocomError


@contextmanager
def new_folder(folder: Path, fault: type[TocomError] = BankError) -> Iterator[Path]:
    """Yield a hidden folder to fill; it becomes `folder` at the end, unless an error came.

    Raises:
        TocomError: a `fault`, if `folder` exists; what is written is never changed.
    """
    if folder.exists():
        raise fault(f"{folder} exists already and is never overwritten")
    folder.parent.mkdir(parents=True, exist_ok=True)
    beside = _beside(folder)
    beside.mkdir()
    try:
        yield beside
        for path in (*beside.iterdir(), beside):
            sync(path)
        beside.rename(folder)
        sync(folder.parent)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


@contextmanager
def new_files(*paths: Path) -> Iterator[Path]:
    """Yield a hidden folder to write files of one folder into, each under its name.

    They appear in their order at the end, unless an error came: what leads to the others goes
    last. One that was not written is left out.

    Raises:
        TocomError: if one of them exists; what is written is never changed.
    """
    for path in paths:
        if path.exists():
            raise TocomError(f"{path} exists already and is never overwritten")
    folder = paths[-1].parent
    folder.mkdir(parents=True, exist_ok=True)
    beside = _beside(paths[-1])
    beside.mkdir()
    try:
        yield beside
        for path in paths:
            if (written := beside / path.name).exists():
                sync(written)
                written.rename(path)
        sync(folder)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def replace_file(path: Path, content: str | bytes) -> None:
    """Give a file a new content in one step: a reader sees the old one or the new one."""
    beside = _beside(path)
    try:
        beside.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
        sync(beside)
        beside.replace(path)
    finally:  # a failure leaves it
        beside.unlink(missing_ok=True)
    sync(path.parent)


def sync(path: Path) -> None:
    """Bring a file's content, or the names within a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}")
