"""Folders of a description and named tensors: strict to read, named by their content.

What banks and tasks have in common. Nothing in such a folder is executable. A fault is named, and
nothing is half-loaded.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Generic, TypeVar

import torch
from pydantic import ValidationError
from pydantic_core import from_json
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from adapters.durable import new_folder
from adapters.schema import Strict, first_fault
from tocom import TocomError

VERSION: Final = 1
_DTYPES = (torch.float32, torch.float16)
#: Bytes that name the tensors in a safetensors file. A tensor has about 90: 13 kB for six targets
#: of twelve blocks. The parser takes thirty times as many, and the interpreter's lock meanwhile.
MAX_HEADER_BYTES: Final = 2**20
#: What a digest covers of the model that a folder is for.
_BACKBONE: Final[dict[str, Any]] = {
    "architecture": True,
    "geometry": {"depth", "width", "heads", "hidden", "input", "patch", "pruned"},
    "digest": True,
}
#: What a digest covers of the ladder that a folder is for; what a ladder is called is a name.
_LADDER: Final[dict[str, Any]] = {
    "method": {"name", "options"},
    "patches": True,
    "rungs": True,
}

Info = TypeVar("Info", bound=Strict)


@dataclass(frozen=True)
class Format(Generic[Info]):
    """A kind of folder.

    Attributes:
        what: it is called in messages.
        files: names of the description and of the tensors.
        info: what the description says: `format_version`, `name`, `backbone`, `digest` and more.
        shapes: returns the name and shape of every tensor that there must be.
        covered: entries that the digest covers, besides `backbone`, `ladder` and the tensors.
            They are written out, so that a new entry with a default changes no digest that there
            is.
        fault: the error that is raised.
        max_info_bytes: that the description may have.
        versions: of the format that are read.
        kind: what its files say in their entry `kind`; None: they have none.
    """

    what: str
    files: tuple[str, str]
    info: type[Info]
    shapes: Callable[[Info], Mapping[str, Sequence[int]]]
    covered: tuple[str, ...]
    fault: type[TocomError]
    max_info_bytes: int
    versions: tuple[int, ...] = (VERSION,)
    kind: str | None = None

    def own(self, info: Info, tensors: Mapping[str, Tensor]) -> tuple[Info, dict[str, Tensor]]:
        """Return the description with its digest, and copies of the tensors on the CPU.

        Raises:
            TocomError: a `fault`, naming the first tensor that is missing, extra, misshapen or not
                finite, or the entry of `info` that no file can hold, or if the digest is another
                or no tensor can be as large as `info` says.
        """
        said = info.model_dump(mode="json")
        what = f"{self.what} {said['name']!r}"
        try:
            shapes = self.shapes(info)
        except RuntimeError as error:  # PyTorch's: more bytes than can be counted
            raise self.fault(f"{what} says shapes that no tensor can have: {error}") from error
        self._check_tensors(what, tensors, shapes)
        copies = {
            name: tensor.detach().to("cpu", copy=True).contiguous()
            for name, tensor in tensors.items()
        }
        covered = dict.fromkeys(self.covered, True) | {"backbone": _BACKBONE, "ladder": _LADDER}
        digest = _digest(info.model_dump(mode="json", include=covered), copies)
        if said["digest"] not in ("", digest):
            raise self.fault(
                f"{what}: the content does not match its digest (says {said['digest'][:12]}, is "
                f"{digest[:12]}): it was changed or corrupted"
            )
        info = self._validate(type(info), said | {"digest": digest}, what)
        self._check_size(_json(info), f"{what}: {self.files[0]}")
        return info, copies

    def read(self, folder: Path) -> tuple[bytes, bytes]:
        """Return the contents of the two files of a folder."""
        return self._read_info(folder), self._read(folder / self.files[1])

    def read_info(self, folder: Path) -> Info:
        """Read the description of a folder; nothing that it says of the tensors is checked."""
        return self._parse_info(self._read_info(folder), folder)

    def parse(self, info: bytes, tensors: bytes, folder: Path) -> tuple[Info, dict[str, Tensor]]:
        """Read the contents of the two files; `folder` is where they are from, for messages."""
        return self._parse_info(info, folder), parse_tensors(
            tensors, folder / self.files[1], self.fault
        )

    def save(self, folder: Path, info: Info, tensors: Mapping[str, Tensor]) -> Path:
        """Write the new folder `folder`, whole or not at all.

        Raises:
            TocomError: a `fault`, if `folder` exists; what is written is never changed.
        """
        with new_folder(folder, self.fault) as beside:
            (beside / self.files[0]).write_bytes(_json(info))
            (beside / self.files[1]).write_bytes(save(dict(tensors)))
        return folder

    def _read_info(self, folder: Path) -> bytes:
        return self._read(folder / self.files[0], self.max_info_bytes + 1)

    def _read(self, file: Path, most: int = -1) -> bytes:
        try:
            with file.open("rb") as opened:
                return opened.read(most)
        except (FileNotFoundError, NotADirectoryError):
            if not file.parent.exists():
                raise self.fault(f"there is no folder {file.parent}") from None
            raise self.fault(f"{file.parent} is no {self.what}: it has no {file.name}") from None
        except OSError as error:
            raise self.fault(f"{file} cannot be read: {error}") from error

    def _parse_info(self, content: bytes, folder: Path) -> Info:
        file = folder / self.files[0]
        self._check_size(content, str(file))
        try:
            said = from_json(content, allow_inf_nan=False)
        except ValueError as error:
            raise self.fault(f"{file} cannot be read: {error}") from error
        info = self._validate(self.info, said, str(file))
        if not said.get("digest"):
            raise self.fault(f"{file} has no digest")
        return info

    def _check_size(self, content: bytes, what: str) -> None:
        if len(content) > self.max_info_bytes:
            raise self.fault(
                f"{what} is larger than the {self.max_info_bytes:,} bytes that are allowed"
            )

    def _validate(self, model: type[Info], said: Any, where: str) -> Info:
        version = said.get("format_version") if isinstance(said, dict) else None
        if version not in self.versions:
            raise self.fault(
                f"{where} has {self.what} format {version!r:.40}; "
                f"this version reads format {' and '.join(map(str, self.versions))}"
            )
        if (kind := said.get("kind")) != self.kind:
            raise self.fault(
                f"{where} is of the kind {kind!r:.40}, not {self.kind!r}"
                if self.kind
                else f"{where} is a {self.what} of the kind {kind!r:.40}, which is opened otherwise"
            )
        try:
            return model.model_validate(said)
        except ValidationError as error:
            raise self.fault(f"{where}: {first_fault(error)}") from error

    def _check_tensors(
        self, what: str, tensors: Mapping[str, Tensor], shapes: Mapping[str, Sequence[int]]
    ) -> None:
        for lacks, names in (
            ("lacks", shapes.keys() - tensors.keys()),
            ("has an unknown", tensors.keys() - shapes.keys()),
        ):
            if names:
                raise self.fault(f"{what} {lacks} tensor {sorted(names)[0]:.200}")
        dtypes = {tensor.dtype for tensor in tensors.values()}
        if len(dtypes) > 1 or not dtypes <= set(_DTYPES):
            raise self.fault(f"{what} must be all fp32 or all fp16, got {sorted(map(str, dtypes))}")
        for name, shape in shapes.items():
            tensor = tensors[name]
            if tuple(tensor.shape) != tuple(shape):
                raise self.fault(f"{what}: {name} must be {list(shape)}, got {list(tensor.shape)}")
            if not torch.isfinite(tensor).all():
                raise self.fault(f"{what}: {name} holds NaN or infinity")


def parse_tensors(content: bytes, file: Path, fault: type[TocomError]) -> dict[str, Tensor]:
    """Read the tensors of a safetensors file from its content; raise `fault` if it has any."""
    # The format begins with the length of its header, in eight bytes.
    if (length := int.from_bytes(content[:8], "little")) > MAX_HEADER_BYTES:
        raise fault(
            f"{file} is truncated or corrupted: its header has {length:,} bytes, "
            f"{MAX_HEADER_BYTES:,} are allowed"
        )
    try:
        return load(content)
    except KeyError as error:
        raise fault(f"{file} holds a tensor of the unknown type {error}") from error
    except (SafetensorError, RuntimeError, TypeError, ValueError, OverflowError) as error:
        # Shapes that no tensor can have are told by PyTorch.
        raise fault(f"{file} is truncated or corrupted: {error}") from error


def _json(info: Strict) -> bytes:
    said = json.dumps(info.model_dump(mode="json"), indent=2, ensure_ascii=False)
    return f"{said}\n".encode()


def _digest(meaning: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """Return SHA-256 of tensors on the CPU and of what gives them meaning."""
    digest = hashlib.sha256(json.dumps(meaning, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()
