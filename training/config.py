"""Recipes: TOML files validated by pydantic, changed from the command line by `key=value`."""

import sys
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tocom import ConfigError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


class Recipe(BaseModel):
    """Part of a recipe: unknown keys are refused, values never change."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class BackboneConfig(Recipe):
    """Which model."""

    name: str = Field(description="as for tocom.load_backbone: a timm name, bundled:NAME, a path")
    architecture: str | None = Field(None, description="timm's name, for a bare weights file")


class PicturesConfig(Recipe):
    """A set of pictures: a folder or a .tar of class folders."""

    path: str
    times: int = Field(1, ge=1, description="how often each picture counts in an epoch")


class AugmentConfig(Recipe):
    """timm's training transform."""

    scale: tuple[float, float] = Field((0.08, 1.0), description="random crop, share of the area")
    hflip: float = Field(0.5, ge=0, le=1)
    color_jitter: float = Field(0.4, ge=0)
    auto_augment: str | None = Field(None, description="timm's notation: rand-m9-mstd0.5-inc1")
    erasing: float = Field(0.0, ge=0, le=1, description="probability of random erasing")


class LoopConfig(Recipe):
    """What every training run has."""

    steps: int = Field(gt=0)
    batch_size: int = Field(gt=0)
    learning_rate: float = Field(gt=0, description="peak, as it is: not scaled by the batch")
    weight_decay: float = Field(0.05, ge=0)
    warmup_steps: int = Field(0, ge=0)
    clip_norm: float | None = Field(None, gt=0)
    precision: Literal["no", "bf16", "fp16"] = Field(
        "no", description="Accelerate's mixed precision"
    )
    seed: int = 0
    workers: int = Field(1, ge=0, description="processes that decode pictures")
    save_every: int = Field(100, gt=0, description="steps between checkpoints")
    watch_every: int = Field(100, gt=0, description="steps between measurements on unseen pictures")


class DistillConfig(Recipe):
    """`tocom-train distill`: plug-ins for one backbone, labels unused."""

    name: str = Field(description="the bank's name")
    backbone: BackboneConfig
    pictures: tuple[PicturesConfig, ...] = Field(min_length=1)
    unseen: int = Field(
        0, ge=0, description="pictures held out of `pictures`, watched while training"
    )
    max_rate: int = Field(16, gt=0)
    rank: int = Field(2, gt=0)
    targets: tuple[Literal["q", "k", "v", "proj", "fc1", "fc2"], ...] = ("q", "v")
    scale: float = Field(0.1, gt=0)
    dropout: float = Field(0.1, ge=0, lt=1, description="on the low-rank hidden values")
    pairs: int = Field(1, gt=0, description="(source, target) pairs a batch, which they share out")
    augment: AugmentConfig = AugmentConfig()
    loop: LoopConfig


class FinetuneConfig(Recipe):
    """`tocom-train finetune`: a model for a labelled task, tuned at one source rate."""

    name: str
    backbone: BackboneConfig
    pictures: PicturesConfig
    test: PicturesConfig
    source: int = Field(0, ge=0, description="rate that the model is tuned at")
    label_smoothing: float = Field(0.1, ge=0, lt=1)
    drop_path: float = Field(0.1, ge=0, lt=1)
    augment: AugmentConfig = AugmentConfig()
    loop: LoopConfig


class EvaluateConfig(Recipe):
    """`tocom-train evaluate`: a model at every rate, with and without a bank."""

    name: str = "evaluation"
    backbone: BackboneConfig
    model: str | None = Field(None, description="what tables and plots call it")
    bank: str | None = Field(None, description="a bank folder, bundled:NAME or a store reference")
    pictures: PicturesConfig
    sources: tuple[int, ...] = Field((0,), min_length=1)
    targets: tuple[int, ...] = Field((), description="default: every rate of the bank")
    max_rate: int = Field(16, ge=0, description="highest default target where there is no bank")
    batch_size: int = Field(50, gt=0)


R = TypeVar("R", bound=Recipe)


def read_recipe(kind: type[R], recipe: str, overrides: Sequence[str] = ()) -> R:
    """Read a recipe and apply `key=value` overrides.

    Args:
        kind: what the recipe describes.
        recipe: a TOML file, or the name of a preset in `training/recipes`.
        overrides: such as `loop.steps=10`; the value is TOML, a bare word is a string.

    Raises:
        ConfigError: naming the key, what came and what is allowed.
    """
    values = _read_toml(_find(recipe))
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise ConfigError(f"an override is key=value, got {override!r}")
        _set(values, key.strip().split("."), _toml_value(text.strip()))
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        lines = [
            f"  {'.'.join(str(part) for part in fault['loc'])}: {fault['msg']}"
            for fault in error.errors()
        ]
        raise ConfigError("\n".join([f"{recipe} is no valid recipe:", *lines])) from None


def presets() -> list[str]:
    """Return the names of the recipes that come with this package."""
    folder = resources.files("training") / "recipes"
    return sorted(Path(item.name).stem for item in folder.iterdir() if item.name.endswith(".toml"))


def _find(recipe: str) -> Path:
    if Path(recipe).is_file():
        return Path(recipe)
    if recipe in presets():
        return Path(str(resources.files("training") / "recipes" / f"{recipe}.toml"))
    raise ConfigError(f"there is no recipe file {recipe!r}; presets: {', '.join(presets())}")


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error


def _toml_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _set(values: dict[str, Any], keys: list[str], value: Any) -> None:
    for key in keys[:-1]:
        values = values.setdefault(key, {})
        if not isinstance(values, dict):
            raise ConfigError(f"{key} is a value, not a table; it cannot hold {keys[-1]}")
    values[keys[-1]] = value
