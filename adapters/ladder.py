"""Ladders as files: `ladder.json`, small and readable, with its evidence.

A file says the method with its options, how many patches its amounts are for, and the rungs. What
a search or a measurement found is kept beside them, as notes.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field
from torch import Tensor

from adapters.schema import NAME, Geometry, Notes, Strict, read_part
from tocom import TOME, Backbone, Ladder, ReductionError, ReductionWeights
from tocom.reduction import method_of, options_of

#: No option is a whole number as large: arithmetic on a forged file stays small.
MAX_OPTION = 2**20
#: What names of a learned method's weights begin with in files, in front of the block.
REDUCTION = "reduction."


def _countable(options: dict[str, Any]) -> dict[str, Any]:
    for name, value in options.items():
        if isinstance(value, int) and not -MAX_OPTION < value < MAX_OPTION:
            raise ValueError(
                f"the option {name!r:.100} must be nearer to 0 than {MAX_OPTION:,}, "
                f"got {value!r:.40}"
            )
    return options


class MethodInfo(Strict):
    """A method: its name and the options that are not at their defaults, or all."""

    name: str = Field(description="name of the method, such as `tome`")
    options: Annotated[dict[str, bool | int | float | str], AfterValidator(_countable)] = Field(
        {}, description="values of its options, by name"
    )


class LadderPart(Strict):
    """A ladder, as a bank or a task says which one it is for."""

    name: str = Field(pattern=f"^{NAME}$", description="what requests call it")
    method: MethodInfo
    patches: int = Field(ge=0, lt=2**31, description="patches of the pictures it is for")
    rungs: Annotated[tuple[tuple[int, ...], ...], Field(max_length=1000)] | None = Field(
        description="amounts of each rung, block by block; null: r in every block at rate r"
    )

    @classmethod
    def describe(cls, ladder: Ladder) -> "LadderPart":
        """Describe a ladder."""
        return cls(
            name=ladder.name,
            method=MethodInfo(name=ladder.method.name, options=options_of(ladder.method)),
            patches=ladder.patches,
            rungs=ladder.rungs,
        )

    def ladder(self) -> Ladder:
        """Return the ladder that is described.

        Raises:
            ReductionError: if there is no such method or option, or the rungs are malformed.
        """
        method = method_of(self.method.name, self.method.options)
        return Ladder(self.name, method, self.rungs, self.patches)


def _sound(part: LadderPart) -> LadderPart:
    part.ladder()
    return part


#: A ladder within another file, checked with it; see `part_of`.
Embedded = Annotated[LadderPart, AfterValidator(_sound)]


class LadderInfo(LadderPart):
    """Everything in `ladder.json`."""

    format_version: Literal[1] = 1
    evidence: Notes = Field({}, description="how it was found and what was measured")

    @classmethod
    def of(cls, ladder: Ladder, evidence: dict[str, Any] | None = None) -> "LadderInfo":
        """Describe a ladder, with its evidence."""
        return cls(**dict(LadderPart.describe(ladder)), evidence=evidence or {})


def is_papers(ladder: Ladder) -> bool:
    """Return whether a ladder does what the paper's does, whatever it is called."""
    return digest(ladder) == digest(TOME)


def part_of(ladder: Ladder) -> LadderPart | None:
    """Return what another file says of its ladder; None: nothing, for it is the paper's."""
    return None if is_papers(ladder) else LadderPart.describe(ladder)


def ladder_of(part: LadderPart | None, depth: int) -> Ladder:
    """Return the ladder that a file for a model of `depth` blocks says; None: the paper's.

    Raises:
        ReductionError: if it is for another number of blocks, or is the paper's: that one is not
            written out, so that all files for it are alike.
    """
    if part is None:
        return TOME
    ladder = part.ladder()
    if is_papers(ladder):
        raise ReductionError(
            f"the ladder {ladder.name!r} is the paper's, which is that of files that name none"
        )
    if ladder.rungs is not None and len(ladder.rungs[0]) != depth:
        raise ReductionError(
            f"the ladder {ladder.name!r} is for {len(ladder.rungs[0])} blocks, the backbone has "
            f"{depth}"
        )
    return ladder


def learned_shapes(ladder: Ladder, geometry: Geometry) -> dict[str, tuple[int, ...]]:
    """Return the name in files and the shape of each weight of a ladder's method, if it learns."""
    shapes = ladder.shapes(geometry.depth, geometry.width, geometry.grid)
    return {f"{REDUCTION}{name}": shape for name, shape in shapes.items()}


def learned_in(tensors: Mapping[str, Tensor], ladder: Ladder) -> ReductionWeights:
    """Return the weights of a ladder's method among the tensors of a file."""
    return ReductionWeights(
        ladder.method,
        {
            name.removeprefix(REDUCTION): tensor
            for name, tensor in tensors.items()
            if name.startswith(REDUCTION)
        },
    )


def tuned_on_another(backbone: Backbone, source: int, ladder: Ladder) -> str | None:
    """Return why a model cannot run on a ladder as one that was tuned at `source`; None: it can.

    Rung 0 is the stock model on every ladder.
    """
    if not source or not backbone.source or digest(ladder) == digest(backbone.ladder):
        return None
    return (
        f"{backbone.name} was tuned at rate {backbone.source} of the ladder "
        f"{backbone.ladder.name!r}, not of {ladder.name!r}"
    )


def digest(ladder: Ladder) -> str:
    """Return the SHA-256 of what a ladder does, whatever it is called."""
    # An option that a method gets one day leaves the digests that there are: only what is not at
    # its default counts. Whole numbers are numbers.
    usual = options_of(type(ladder.method)())
    options = {
        name: float(value) if isinstance(value, int) and not isinstance(value, bool) else value
        for name, value in options_of(ladder.method).items()
        if value != usual[name]
    }
    said = {
        "method": {"name": ladder.method.name, "options": options},
        "patches": ladder.patches,
        "rungs": ladder.rungs,
    }
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def read_ladder(path: str | Path) -> LadderInfo:
    """Read a `ladder.json`, or that of a folder.

    Raises:
        ReductionError: if it cannot be read or is malformed; the message names the fault.
    """
    path = Path(path)
    path = path / "ladder.json" if path.is_dir() else path
    info = read_part(LadderInfo, path, "ladder", ReductionError)
    info.ladder()
    return info


def write_ladder(info: LadderInfo, path: str | Path) -> Path:
    """Write a `ladder.json`: one rung a line."""
    said = {"format_version": info.format_version} | info.model_dump(mode="json")
    rungs = said.pop("rungs")
    text = json.dumps(said | {"rungs": "@"}, indent=2)
    if rungs is None:
        lines = "null"
    else:
        lines = "[\n    " + ",\n    ".join(map(json.dumps, rungs)) + "\n  ]"
    Path(path).write_text(text.replace('"@"', lines) + "\n")
    return Path(path)
