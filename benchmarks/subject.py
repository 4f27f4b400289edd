"""What is measured: a model, and the pictures that it is asked about."""

import argparse
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from server.models.loading import load_model
from server.models.served import ServedModel
from server.settings import BUNDLED_MODEL, ModelSettings
from tocom import bundled_folder
from training.measuring import class_indices
from training.pictures.config import PicturesConfig
from training.pictures.sets import open_pictures


@dataclass(frozen=True)
class Subject:
    """See the module.

    Attributes:
        settings: what the server is told of the model.
        pictures: encoded, as they are uploaded.
        classes: the model's class of each picture; None: they are not labelled.
    """

    settings: ModelSettings
    pictures: list[bytes]
    classes: list[int] | None

    @property
    def served(self) -> list[dict[str, Any]]:
        """The setting `models` of a server of this model alone."""
        return [self.settings.model_dump(exclude_none=True)]

    def load(self) -> ServedModel:
        """Load the model as a server does."""
        return load_model(self.settings)

    @property
    def described(self) -> str:
        """A line for reports."""
        bank = f"bank {self.settings.bank}" if self.settings.bank else "no bank"
        mean = sum(map(len, self.pictures)) / len(self.pictures) / 1024
        return (
            f"{self.settings.backbone}, {bank}; {len(self.pictures)} pictures of {mean:.0f} KiB on "
            f"average{'' if self.classes else ', without labels'}"
        )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that name model and pictures."""
    parser.add_argument("--backbone", default=BUNDLED_MODEL.backbone)
    parser.add_argument("--architecture", help="timm's name, for a .safetensors file")
    parser.add_argument("--bank", default=BUNDLED_MODEL.bank)
    parser.add_argument(
        "--pictures", help="a .tar or folder of class folders; default: the bundled samples"
    )
    parser.add_argument("--limit", type=int, default=500, help="pictures to use, drawn at random")


def from_arguments(arguments: argparse.Namespace) -> Subject:
    """Return what the options name."""
    settings = ModelSettings(
        name="benchmark",
        backbone=arguments.backbone,
        architecture=arguments.architecture,
        bank=arguments.bank,
    )
    if arguments.pictures is None:
        samples = sorted(bundled_folder("samples").glob("*.jpg"))
        return Subject(settings, [path.read_bytes() for path in samples], None)
    pictures, classes = labelled(arguments.pictures, settings, arguments.limit)
    return Subject(settings, pictures, classes)


def labelled(path: str, settings: ModelSettings, limit: int) -> tuple[list[bytes], list[int]]:
    """Return some pictures of a .tar or folder, and the model's class of each.

    Raises:
        DataError: if they cannot be read, or their folders are not the model's classes.
    """
    config = PicturesConfig(path=str(Path(path)))
    folders = class_indices(config, load_model(settings).backbone)
    reader = open_pictures(config).reader
    chosen = random.Random(0).sample(range(len(reader)), min(limit, len(reader)))
    pictures, classes = [], []
    for index in chosen:
        file, folder = reader[index]
        with file:
            pictures.append(file.read())
        classes.append(folders[folder])
    return pictures, classes
