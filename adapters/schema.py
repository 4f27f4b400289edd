"""What `bank.json` and `task.json` are made of: strict parts, and the model that a file is for."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Final, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    FailFast,
    Field,
    JsonValue,
    ValidationError,
    model_validator,
)
from timm.models.vision_transformer import VisionTransformer

from tocom import Backbone
from tocom.pruned import Channels
from tocom.wording import words_of

#: What banks, tasks and ladders may be called.
NAME = r"[a-z0-9][a-z0-9._-]{0,99}"
#: Of attention: left out of files where it is true, which it is without the entry.
Proportional = Annotated[
    bool,
    Field(
        exclude_if=lambda proportional: proportional,
        description="whether merged tokens count in attention by their size; without it, they do",
    ),
]
#: Levels of lists and objects within notes. A trainer's have six.
MAX_DEPTH = 32


def _shallow(notes: dict[str, JsonValue]) -> dict[str, JsonValue]:
    level: list[dict[str, JsonValue] | list[JsonValue]] = [notes]
    for _ in range(MAX_DEPTH):
        level = [
            inner
            for value in level
            for inner in (value.values() if isinstance(value, dict) else value)
            if isinstance(inner, (dict, list))
        ]
    if level:
        raise ValueError(f"lists and objects may be nested {MAX_DEPTH} deep")
    return notes


#: What may be said of a file's content in any form; no part of its digest.
Notes = Annotated[dict[str, JsonValue], AfterValidator(_shallow)]


def _once_each(targets: tuple[str, ...]) -> tuple[str, ...]:
    if len(set(targets)) < len(targets):
        raise ValueError(f"each target may stand once, got {', '.join(targets)}")
    return targets


#: Layers of each block that plug-ins change.
Targets = Annotated[
    tuple[Literal["q", "k", "v", "proj", "fc1", "fc2"], ...],
    Field(min_length=1),
    FailFast(),
    AfterValidator(_once_each),
]
#: Of a ladder or a cascade: a ladder of a hundred rungs for a hundred blocks has 50 kB.
MAX_BYTES: Final = 2**20
# Far above any model; keeps the arithmetic on a forged bank.json small.
Count = Annotated[int, Field(gt=0, lt=2**31)]


class Strict(BaseModel):
    """Part of a file: unknown entries are refused, values never change."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


Part = TypeVar("Part", bound=Strict)


class Pruned(Strict):
    """The channels of a pruned model, one number a block."""

    qk: tuple[Count, ...] = Field(description="of a query and of a key, in each head")
    v: tuple[Count, ...] = Field(description="of a value, in each head")
    hidden: tuple[Count, ...] = Field(description="inside the MLP")


class Geometry(Strict):
    """What a model must share with a bank: its shape, not its weights."""

    depth: int = Field(gt=0, le=1000, description="blocks")
    width: Count = Field(description="channels of a token")
    heads: Count
    hidden: Count = Field(description="channels inside the MLP; the most, if it is pruned")
    input: tuple[Count, Count] = Field(description="height and width in pixels")
    patch: tuple[Count, Count]
    pruned: Pruned | None = Field(
        None,
        exclude_if=lambda pruned: pruned is None,
        description="the channels of each block of a pruned model; others have no such entry",
    )

    @model_validator(mode="after")
    def _of_every_block(self) -> "Geometry":
        for key, widths in self.pruned or ():
            if len(widths) != self.depth:
                raise ValueError(
                    f"pruned.{key} must have a number for each of {self.depth} blocks, got "
                    f"{len(widths)}"
                )
        return self

    @property
    def patches(self) -> int:
        """How many tokens an image gives, without prefix tokens."""
        (height, width), (high, wide) = self.input, self.patch
        return height // high * (width // wide)

    @classmethod
    def of(cls, model: VisionTransformer) -> "Geometry":
        """Read the geometry off a model."""
        block: Any = model.blocks[0]  # torch types what a module holds as Tensor | Module
        channels = Channels.of(model)
        return cls(
            depth=len(model.blocks),
            width=model.embed_dim,
            heads=block.attn.num_heads,
            hidden=max(channels.hidden) if channels else block.mlp.fc2.in_features,
            input=tuple(model.patch_embed.img_size),
            patch=tuple(model.patch_embed.patch_size),
            pruned=Pruned.model_validate(asdict(channels)) if channels else None,
        )

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.input[0] // self.patch[0], self.input[1] // self.patch[1]

    def channels(self, target: str, block: int) -> tuple[int, int]:
        """Return (in, out) channels of a target, or of `qkv`, in a block."""
        qk, v, hidden = self.width, self.width, self.hidden
        if self.pruned is not None:
            qk, v = self.heads * self.pruned.qk[block], self.heads * self.pruned.v[block]
            hidden = self.pruned.hidden[block]
        outputs = {"q": qk, "k": qk, "v": v, "qkv": 2 * qk + v, "fc1": hidden}
        inputs = {"proj": v, "fc2": hidden}
        return inputs.get(target, self.width), outputs.get(target, self.width)


class BackboneInfo(Strict):
    """The model that a bank was distilled for, or a task was tuned on."""

    architecture: str = Field(description="timm's name")
    geometry: Geometry
    digest: str = Field(description="SHA-256 of its weights as fp32")

    @classmethod
    def of(cls, backbone: Backbone) -> "BackboneInfo":
        """Describe a loaded backbone."""
        return cls(
            architecture=backbone.architecture,
            geometry=Geometry.of(backbone.model),
            digest=backbone.digest,
        )


def read_part(part: type[Part], path: Path, what: str, fault: type[ValueError]) -> Part:
    """Read a small JSON file.

    Args:
        part: what it holds.
        path: the file.
        what: it is called in messages.
        fault: what is raised.

    Raises:
        fault: if it cannot be read or is malformed; the message names what is wrong.
    """
    try:
        with path.open("rb") as opened:
            content = opened.read(MAX_BYTES + 1)
    except OSError as error:
        raise fault(f"cannot read the {what} {path}: {error.strerror}") from error
    if len(content) > MAX_BYTES:
        raise fault(f"{path} is no {what}: it has more than {MAX_BYTES} bytes")
    try:
        return part.model_validate_json(content)
    except ValidationError as error:
        raise fault(f"{path} is no {what}: {first_fault(error)}") from error


def first_fault(error: ValidationError) -> str:
    """Return one line of pydantic's many: the entry and what is wrong with it."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    where = "".join(f"{part}." for part in first["loc"])[:-1]
    return f"{where:.200}: {words_of(first)}" if where else words_of(first)
