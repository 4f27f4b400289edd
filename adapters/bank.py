"""Banks of plug-ins: one low-rank pair per step of the rate ladder, layer and target.

A bank is a folder with `bank.json` and `plugins.safetensors`; nothing in it is executable. In
format 1 its rates are those of the paper's ladder, format 2 says of which. Loading is strict and
whole: a fault is named, nothing is half-loaded. Saving is atomic: a crash leaves no half-written
folder under its name. A bank knows neither the arithmetic of rates (`compose`) nor where banks are
kept (`store`, `hub`).

Reference: Token Compensator (ToCom), arXiv:2408.06798, section 3.2.
"""

import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from adapters.calibration import Calibration
from adapters.format import VERSION, Format
from adapters.ladder import (
    Embedded,
    ladder_of,
    learned_in,
    learned_shapes,
    part_of,
    tuned_on_another,
)
from adapters.schema import (
    NAME,
    BackboneInfo,
    Count,
    Geometry,
    Notes,
    Proportional,
    Strict,
    Targets,
)
from tocom import Backbone, BankError, Ladder, ReductionError, ReductionWeights
from tocom.delta import TARGETS

#: A real `bank.json` has some kilobytes, notes included.
MAX_INFO_BYTES: Final = 2**20
FILES: Final = "bank.json", "plugins.safetensors"


class BankInfo(Strict):
    """Everything in `bank.json`."""

    format_version: Literal[1, 2] = VERSION
    name: str = Field(pattern=f"^{NAME}$")
    backbone: BackboneInfo
    method: str = Field("tome", description="how tokens are reduced")
    ladder: Embedded | None = Field(
        None,
        exclude_if=lambda ladder: ladder is None,
        description="what the rates mean, in format 2; in format 1 it is the paper's",
    )
    proportional: Proportional = True
    max_rate: Count = Field(description="R: the steps are 0→1 ... R-1→R")
    rank: Count = Field(description="width of one step's low-rank pair")
    targets: Targets
    scale: float = Field(gt=0, description="multiplier s of the sum of steps")
    training: Notes = Field({})
    evaluation: Notes = Field({})
    digest: str = Field(
        default="", description="SHA-256 of the tensors and what gives them meaning"
    )

    @model_validator(mode="after")
    def _of_one_ladder(self) -> "BankInfo":
        if self.format_version == 1 and self.ladder is not None:
            raise ValueError("a bank of format 1 has no ladder of its own: it is the paper's")
        if self.format_version == 2 and self.ladder is None:
            raise ValueError("a bank of format 2 must say its ladder")
        ladder = ladder_of(self.ladder, self.backbone.geometry.depth)
        if self.method != ladder.method.name:
            raise ValueError(
                f"the method of the ladder {ladder.name!r} is {ladder.method.name!r}, not "
                f"{self.method!r:.100}"
            )
        if ladder.top not in (None, self.max_rate):
            raise ValueError(
                f"max_rate must be the last rung of the ladder {ladder.name!r}, {ladder.top}, got "
                f"{self.max_rate}"
            )
        most = self.backbone.geometry.patches  # more rates take memory and mean nothing
        if ladder.top is None and self.max_rate > most:
            raise ValueError(
                f"max_rate must be at most {most}, the patches of a picture, got {self.max_rate}"
            )
        return self


class Bank:
    """A bank in memory.

    Attributes:
        info: what `bank.json` says, its digest included.
        ladder: what its rates mean.
        tensors: `blocks.{i}.attn.q.A` [R, k, in] and `.B` [R, out, k], and so on for each target;
            step i→i+1 stands at index i. If the ladder's method learns with banks, also its
            weights, `reduction.{i}...`. On the CPU, fp32 or fp16.
    """

    def __init__(self, info: BankInfo, tensors: Mapping[str, Tensor]) -> None:
        """Check copies of the tensors against `info` and name the bank by its digest.

        Raises:
            BankError: naming the first tensor that is missing, extra, misshapen or not finite,
                or the entry of `info` that no `bank.json` can hold.
        """
        self.info, self.tensors = _FORMAT.own(info, tensors)
        self.ladder = ladder_of(self.info.ladder, self.info.backbone.geometry.depth)

    @classmethod
    def load(cls, folder: str | Path) -> "Bank":
        """Read a bank folder.

        Raises:
            BankError: if anything about it is wrong; the message names the fault.
        """
        return cls.from_bytes(*_FORMAT.read(Path(folder)), Path(folder))

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
        return cls(*_FORMAT.parse(info, plugins, folder))

    def save(self, folder: str | Path) -> Path:
        """Write the bank as the new folder `folder`, whole or not at all.

        Raises:
            BankError: if `folder` exists; a written bank is never changed.
        """
        return _FORMAT.save(Path(folder), self.info, self.tensors)

    def check_fits(self, backbone: Backbone, source: int | None = None) -> None:
        """Raise BankError unless the bank is for such models, tuned at `source` of its ladder.

        See `check_geometry` and `check_source`; `source` is by default the model's own. Warns if
        the model neither has the weights that the bank was distilled on nor says that
        it was tuned from them: a bank of an unrelated model of the same shape repairs nothing. And
        if the model would run with the other attention without the bank: see `overrides`.
        """
        self.check_geometry(backbone)
        self.check_source(backbone, backbone.source if source is None else source)
        if (overridden := self.overrides(backbone)) is not None:
            warnings.warn(overridden, stacklevel=2)
        if not self.distilled_on(backbone):
            warnings.warn(
                f"bank {self.info.name!r} was distilled on other weights than {backbone.name} has: "
                "right for a model tuned from that backbone, useless for another",
                stacklevel=2,
            )

    def check_geometry(self, backbone: Backbone) -> None:
        """Raise BankError unless the bank's geometry is the model's and it can run the ladder."""
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
        try:
            self.ladder.check(backbone.model)
        except ReductionError as error:
            raise BankError(
                f"bank {self.info.name!r} does not fit {backbone.name}: {error}"
            ) from error

    def check_source(self, backbone: Backbone, source: int) -> None:
        """Raise BankError if a model was tuned on another ladder, unless `source` is 0."""
        self.check_attention(backbone, source)
        if (reason := tuned_on_another(backbone, source, self.ladder)) is not None:
            raise BankError(
                f"bank {self.info.name!r} is for the ladder {self.ladder.name!r}: {reason}"
            )

    def check_attention(self, backbone: Backbone, source: int) -> None:
        """Raise BankError if a model was tuned with the other attention, unless `source` is 0.

        Proportional or not: at rate 0, where nothing is merged, they are the same.
        """
        if source and backbone.source and backbone.proportional != self.info.proportional:
            raise BankError(
                f"bank {self.info.name!r} is for {_attention(self.info.proportional)}, and "
                f"{backbone.name} was tuned at rate {backbone.source} with "
                f"{_attention(backbone.proportional)}"
            )

    def overrides(self, backbone: Backbone) -> str | None:
        """Return a warning if a tuned model says the other attention than the bank; None: it fits.

        With a bank the model runs as the plug-ins have learned. A model that is what the bank was
        distilled on was not tuned, and says nothing.
        """
        own, other = self.info.proportional, backbone.proportional
        if own == other or self.info.backbone.digest == backbone.digest:
            return None
        return (
            f"bank {self.info.name!r} is for {_attention(own)} and {backbone.name} for "
            f"{_attention(other)}: with the bank it runs as the bank says"
        )

    def distilled_on(self, backbone: Backbone) -> bool:
        """Tell whether a model has the weights it was distilled on, or was tuned from them."""
        return self.info.backbone.digest in (backbone.tuned_from, backbone.digest)

    def multiplier(self, backbone: Backbone, source: int, target: int) -> float:
        """Return the multiplier of Δ(source→target): the model's calibration's or the bank's.

        Raises:
            BackboneError: if the model's calibration is malformed.
        """
        found, scale = Calibration.of(backbone), None
        if found is not None and found.fits(self.info.digest, source):
            scale = found.scale(target)
        return self.info.scale if scale is None else scale

    def learned(self, device: torch.device | str) -> ReductionWeights | None:
        """Return what its ladder's method has learned, in fp32; None if that is not its matter."""
        if not self.ladder.method.in_bank:
            return None
        learned = learned_in(self.tensors, self.ladder)
        on_device = {name: tensor.to(device).float() for name, tensor in learned.tensors.items()}
        return replace(learned, tensors=on_device)

    @property
    def parameters(self) -> int:
        """Number of values in the bank."""
        return sum(tensor.numel() for tensor in self.tensors.values())

    @property
    def plugins(self) -> int:
        """Number of values in its plug-ins."""
        return sum(self.tensors[name].numel() for name in plugin_shapes(self.info))


def _attention(proportional: bool) -> str:
    return "proportional attention" if proportional else "attention that is not proportional"


def learned_with(backbone: Backbone, bank: Bank | None) -> ReductionWeights | None:
    """Return what a method has learned for a model that runs with a bank, or without one."""
    own = None if bank is None else bank.learned(next(backbone.model.parameters()).device)
    return backbone.learned if own is None else own


def ladder_entries(ladder: Ladder) -> dict[str, Any]:
    """Return the entries of `BankInfo` by which a bank is one for `ladder`."""
    if (part := part_of(ladder)) is None:
        return {}
    return {"format_version": 2, "method": ladder.method.name, "ladder": part}


def read_info(folder: Path) -> BankInfo:
    """Read the `bank.json` of a bank folder; nothing that it says of the tensors is checked.

    Raises:
        BankError: if it cannot be read or is no `bank.json`.
    """
    return _FORMAT.read_info(folder)


def target_names(info: BankInfo) -> list[str]:
    """Return the targeted layers of a bank: `blocks.0.attn.q`, `blocks.0.attn.v`, ..."""
    depth = info.backbone.geometry.depth
    rooms = {target: TARGETS[target][0].partition(".")[0] for target in info.targets}
    return [f"blocks.{i}.{room}.{target}" for i in range(depth) for target, room in rooms.items()]


def tensor_shapes(info: BankInfo) -> dict[str, tuple[int, ...]]:
    """Return the name and shape of every tensor that a bank has."""
    return plugin_shapes(info) | metric_shapes(info)


def metric_shapes(info: BankInfo) -> dict[str, tuple[int, ...]]:
    """Return those of the weights of the ladder's method, if it learns with banks."""
    geometry = info.backbone.geometry
    ladder = ladder_of(info.ladder, geometry.depth)
    return learned_shapes(ladder, geometry) if ladder.method.in_bank else {}


def plugin_shapes(info: BankInfo) -> dict[str, tuple[int, ...]]:
    """Return those of the plug-ins."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name in target_names(info):
        _, block, *_, target = name.split(".")
        inputs, outputs = info.backbone.geometry.channels(target, int(block))
        shapes[f"{name}.A"] = (info.max_rate, info.rank, inputs)
        shapes[f"{name}.B"] = (info.max_rate, outputs, info.rank)
    return shapes


_FORMAT = Format(
    what="bank",
    files=FILES,
    info=BankInfo,
    shapes=tensor_shapes,
    covered=(
        "format_version",
        "name",
        "method",
        "max_rate",
        "rank",
        "targets",
        "scale",
        "proportional",
    ),
    fault=BankError,
    max_info_bytes=MAX_INFO_BYTES,
    versions=(1, 2),
)
