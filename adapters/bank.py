"""Banks of plug-ins: one low-rank pair per step of the rate ladder, layer and target.

Format 1 is a folder with `bank.json` and `plugins.safetensors`; nothing in it is
executable. Loading is strict and whole: a fault is named, nothing is half-loaded. Saving is
atomic: a crash leaves no half-written folder under its name. A bank knows neither the
arithmetic of rates (`compose`) nor where banks are kept (`store`, `hub`).

Reference: Token Compensator (ToCom), arXiv:2408.06798, section 3.2.
"""

import hashlib
import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError, field_validator
from pydantic_core import from_json
from safetensors import SafetensorError
from safetensors.torch import load, save
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from adapters.durable import new_folder
from tocom import Backbone, BankError
from tocom.delta import TARGETS

FORMAT_VERSION: Final = 1
NAME = r"[a-z0-9][a-z0-9._-]{0,99}"
FILES = _INFO, _TENSORS = "bank.json", "plugins.safetensors"
_DTYPES = (torch.float32, torch.float16)

# Far above any model; keeps the arithmetic on a forged bank.json small.
_Count = Annotated[int, Field(gt=0, lt=2**31)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Geometry(_Strict):
    """What a model must share with a bank: its shape, not its weights."""

    depth: int = Field(gt=0, le=1000, description="blocks")
    width: _Count = Field(description="channels of a token")
    heads: _Count
    hidden: _Count = Field(description="channels inside the MLP")
    input: tuple[_Count, _Count] = Field(description="height and width in pixels")
    patch: tuple[_Count, _Count]

    @classmethod
    def of(cls, model: VisionTransformer) -> "Geometry":
        """Read the geometry off a model."""
        block: Any = model.blocks[0]  # torch types what a module holds as Tensor | Module
        return cls(
            depth=len(model.blocks),
            width=model.embed_dim,
            heads=block.attn.num_heads,
            hidden=block.mlp.fc2.in_features,
            input=tuple(model.patch_embed.img_size),
            patch=tuple(model.patch_embed.patch_size),
        )

    def channels(self, target: str) -> tuple[int, int]:
        """Return (in, out) channels of a target."""
        return {"fc1": (self.width, self.hidden), "fc2": (self.hidden, self.width)}.get(
            target, (self.width, self.width)
        )


class BankBackbone(_Strict):
    """The model that a bank was distilled for."""

    architecture: str = Field(description="timm's name")
    geometry: Geometry
    digest: str = Field(description="SHA-256 of its weights as fp32")

    @classmethod
    def of(cls, backbone: Backbone) -> "BankBackbone":
        """Describe a loaded backbone."""
        return cls(
            architecture=backbone.architecture,
            geometry=Geometry.of(backbone.model),
            digest=backbone.digest,
        )


class BankInfo(_Strict):
    """Everything in `bank.json`."""

    format_version: Literal[1] = FORMAT_VERSION
    name: str = Field(pattern=f"^{NAME}$")
    backbone: BankBackbone
    method: Literal["tome"] = "tome"
    max_rate: _Count = Field(description="R: the steps are 0→1 ... R-1→R")
    rank: _Count = Field(description="width of one step's low-rank pair")
    targets: tuple[Literal["q", "k", "v", "proj", "fc1", "fc2"], ...] = Field(min_length=1)
    scale: float = Field(gt=0, description="multiplier s of the sum of steps")
    training: dict[str, JsonValue] = {}
    evaluation: dict[str, JsonValue] = {}
    digest: str = Field(
        default="", description="SHA-256 of the tensors and what gives them meaning"
    )

    @field_validator("targets")
    @classmethod
    def _once_each(cls, targets: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(targets)) < len(targets):
            raise ValueError(f"each target may stand once, got {', '.join(targets)}")
        return targets


class Bank:
    """A bank in memory.

    Attributes:
        info: what `bank.json` says, its digest included.
        tensors: `blocks.{i}.attn.q.A` [R, k, in] and `.B` [R, out, k], and so on for each target;
            step i→i+1 stands at index i. On the CPU, fp32 or fp16.
    """

    def __init__(self, info: BankInfo, tensors: Mapping[str, Tensor]) -> None:
        """Check copies of the tensors against `info` and name the bank by its digest.

        Raises:
            BankError: naming the first tensor that is missing, extra, misshapen or not finite,
                or the entry of `info` that no `bank.json` can hold.
        """
        _check_tensors(info, tensors)
        self.tensors = {
            name: tensor.detach().to("cpu", copy=True).contiguous()
            for name, tensor in tensors.items()
        }
        digest = _digest(info, self.tensors)
        if info.digest not in ("", digest):
            raise BankError(
                f"bank {info.name!r}: the content does not match its digest "
                f"(says {info.digest[:12]}, is {digest[:12]}): it was changed or corrupted"
            )
        self.info = _parse(info.model_dump(mode="json") | {"digest": digest}, f"bank {info.name!r}")

    @classmethod
    def load(cls, folder: str | Path) -> "Bank":
        """Read a bank folder.

        Raises:
            BankError: if anything about it is wrong; the message names the fault.
        """
        folder = Path(folder)
        try:
            info, plugins = ((folder / name).read_bytes() for name in FILES)
        except (FileNotFoundError, NotADirectoryError) as error:
            missing = Path(error.filename).name
            raise BankError(f"{folder} is no bank: it has no {missing}") from None
        except OSError as error:
            raise BankError(f"{folder} cannot be read: {error}") from error
        return cls.from_bytes(info, plugins, folder)

    @classmethod
    def from_bytes(cls, info: bytes, plugins: bytes, folder: Path = Path()) -> "Bank":
        """Read a bank from the contents of its two files.

        Args:
            info: of `bank.json`.
            plugins: of `plugins.safetensors`.
            folder: where they are from, for messages.

        Raises:
            BankError: if anything about it is wrong; the message names the fault.
        """
        parsed = _parse_file(info, folder / _INFO)
        file = folder / _TENSORS
        try:
            tensors = load(plugins)
        except KeyError as error:
            raise BankError(f"{file} holds a tensor of the unknown type {error}") from error
        except SafetensorError as error:
            raise BankError(f"{file} is truncated or corrupted: {error}") from error
        return cls(parsed, tensors)

    def save(self, folder: str | Path) -> Path:
        """Write the bank as the new folder `folder`, whole or not at all.

        Raises:
            BankError: if `folder` exists; a written bank is never changed.
        """
        info = json.dumps(self.info.model_dump(mode="json"), indent=2, ensure_ascii=False)
        with new_folder(Path(folder)) as beside:
            (beside / _INFO).write_text(info + "\n", encoding="utf-8")
            (beside / _TENSORS).write_bytes(save(self.tensors))
        return Path(folder)

    @classmethod
    def from_pretrained(
        cls,
        id_or_folder: str | Path,
        *,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        token: str | bool | None = None,
    ) -> "Bank":
        """Read a bank from a folder or from the Hugging Face Hub.

        Args:
            id_or_folder: a bank folder, which wins over the hub; or `ORG/NAME` on the hub.
            revision, cache_dir, local_files_only, token: of the hub, as for
                `huggingface_hub.snapshot_download`.

        Raises:
            BankError: if anything about it is wrong, or it cannot be had from here.
        """
        from adapters.hub import fetch  # it builds on this module

        if isinstance(id_or_folder, Path) or (Path(id_or_folder) / _INFO).exists():
            return cls.load(id_or_folder)
        return cls.load(
            fetch(
                id_or_folder,
                revision=revision,
                cache_dir=cache_dir,
                local_files_only=local_files_only,
                token=token,
            )
        )

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        revision: str | None = None,
        commit_message: str | None = None,
        token: str | bool | None = None,
        create_pr: bool = False,
        plots: Sequence[str | Path] = (),
        license: str | None = None,  # noqa: A002 (the hub's word)
    ) -> str:
        """Upload the bank to the Hugging Face Hub, with a generated model card.

        Args:
            repo_id: `ORG/NAME`; it is made if it is not there. Its `README.md` is replaced.
            private: whether it must be private; by default what the organisation has chosen.
            revision: branch, made if it is not there; by default the default branch.
            commit_message: by default the bank's name and digest.
            token: by default who is signed in.
            create_pr: open a pull request instead of a commit; then without `revision`.
            plots: picture files to add to the repository and to show on the card.
            license: the hub's identifier of the bank's licence; none is claimed unless given.

        Returns:
            The URL of the commit.

        Raises:
            BankError: if it cannot be uploaded; nothing is half-committed.
        """
        from adapters.hub import push  # it builds on this module

        return push(
            self,
            repo_id,
            private=private,
            revision=revision,
            commit_message=commit_message,
            token=token,
            create_pr=create_pr,
            plots=plots,
            license=license,
        )

    def check_fits(self, backbone: Backbone) -> None:
        """Raise BankError unless the bank's geometry is the model's.

        Warns if the model neither has the weights that the bank was distilled on nor says that
        it was tuned from them: a bank of an unrelated model of the same shape repairs nothing.
        """
        self.check_geometry(backbone)
        if not self.distilled_on(backbone):
            warnings.warn(
                f"bank {self.info.name!r} was distilled on other weights than {backbone.name} has: "
                "right for a model tuned from that backbone, useless for another",
                stacklevel=2,
            )

    def check_geometry(self, backbone: Backbone) -> None:
        """Raise BankError unless the bank's geometry is the model's."""
        own, other = self.info.backbone.geometry, Geometry.of(backbone.model)
        if own != other:
            differing = ", ".join(
                f"{key} {value} (model: {getattr(other, key)})"
                for key, value in own
                if value != getattr(other, key)
            )
            raise BankError(
                f"bank {self.info.name!r} is for {self.info.backbone.architecture} and does not "
                f"fit {backbone.name}: {differing}"
            )

    def distilled_on(self, backbone: Backbone) -> bool:
        """Tell whether a model has the weights it was distilled on, or was tuned from them."""
        return self.info.backbone.digest in (backbone.tuned_from, backbone.digest)

    @property
    def parameters(self) -> int:
        """Number of values in the bank."""
        return sum(tensor.numel() for tensor in self.tensors.values())


def read_info(folder: Path) -> BankInfo:
    """Read the `bank.json` of a bank folder; nothing that it says of the tensors is checked.

    Raises:
        BankError: if it cannot be read or is no `bank.json`.
    """
    try:
        return _parse_file((folder / _INFO).read_bytes(), folder / _INFO)
    except OSError as error:
        raise BankError(f"{folder / _INFO} cannot be read: {error}") from error


def target_names(info: BankInfo) -> list[str]:
    """Return the targeted layers of a bank: `blocks.0.attn.q`, `blocks.0.attn.v`, ..."""
    depth = info.backbone.geometry.depth
    rooms = {target: TARGETS[target][0].partition(".")[0] for target in info.targets}
    return [f"blocks.{i}.{room}.{target}" for i in range(depth) for target, room in rooms.items()]


def tensor_shapes(info: BankInfo) -> dict[str, tuple[int, int, int]]:
    """Return the name and shape of every tensor that a bank has."""
    shapes = {}
    for name in target_names(info):
        inputs, outputs = info.backbone.geometry.channels(name.rpartition(".")[2])
        shapes[f"{name}.A"] = (info.max_rate, info.rank, inputs)
        shapes[f"{name}.B"] = (info.max_rate, outputs, info.rank)
    return shapes


def first_fault(error: ValidationError) -> str:
    """Return one line of pydantic's many: the entry and what is wrong with it."""
    first = error.errors()[0]
    return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"


def _parse_file(content: bytes, file: Path) -> BankInfo:
    try:
        raw = from_json(content, allow_inf_nan=False)
    except ValueError as error:
        raise BankError(f"{file} cannot be read: {error}") from error
    info = _parse(raw, str(file))
    if not info.digest:
        raise BankError(f"{file} has no digest")
    return info


def _parse(raw: Any, where: str) -> BankInfo:
    version = raw.get("format_version") if isinstance(raw, dict) else None
    if version != FORMAT_VERSION:
        raise BankError(
            f"{where} has bank format {version!r}; this version reads format {FORMAT_VERSION}"
        )
    try:
        return BankInfo.model_validate(raw)
    except ValidationError as error:
        raise BankError(f"{where}: {first_fault(error)}") from error


def _check_tensors(info: BankInfo, tensors: Mapping[str, Tensor]) -> None:
    shapes = tensor_shapes(info)
    for what, names in (
        ("lacks", shapes.keys() - tensors.keys()),
        ("has an unknown", tensors.keys() - shapes.keys()),
    ):
        if names:
            raise BankError(f"bank {info.name!r} {what} tensor {sorted(names)[0]}")
    dtypes = {tensor.dtype for tensor in tensors.values()}
    if len(dtypes) > 1 or not dtypes <= set(_DTYPES):
        raise BankError(
            f"bank {info.name!r} must be all fp32 or all fp16, got {sorted(map(str, dtypes))}"
        )
    for name, shape in shapes.items():
        if tuple(tensors[name].shape) != shape:
            raise BankError(
                f"bank {info.name!r}: {name} must be {list(shape)}, got {list(tensors[name].shape)}"
            )
        if not torch.isfinite(tensors[name]).all():
            raise BankError(f"bank {info.name!r}: {name} holds NaN or infinity")


def _digest(info: BankInfo, tensors: Mapping[str, Tensor]) -> str:
    """Hash what decides an answer; training notes and evaluations may be added later."""
    meaning = info.model_dump(mode="json", exclude={"training", "evaluation", "digest"})
    digest = hashlib.sha256(json.dumps(meaning, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()
