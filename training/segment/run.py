"""Training a segmenter on labelled scenes.

What comes out: a task folder with the decoder, and AdaptFormer's branches if the encoder has them.
Of a fully tuned encoder also a model folder in timm's own form, which the task is then for. The
test scenes are read once, when the result is written: it is the written one that is tested.

Reference: Segmenter, arXiv:2105.05633, section 4.1.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from pydantic import ValidationError
from torch import Tensor

from adapters.durable import replace_file
from adapters.ladder import part_of
from adapters.schema import BackboneInfo, first_fault
from adapters.segmentation import SegmentationModel, Segmenter, open_segmentation
from tocom import Backbone, ConfigError, load_backbone
from training import loop
from training.config import AugmentConfig
from training.finetune import save_model
from training.pictures.batches import Batches
from training.pictures.sampler import Draw
from training.pictures.unseen import read_unseen
from training.run_folder import read_metrics, refuse_other_run
from training.screen.header import header
from training.screen.progress import say
from training.segment.augment import SceneTransform, TestScene, TrainScene
from training.segment.config import SegmentConfig
from training.segment.job import Segmenting, count_all, described
from training.segment.metrics import figures
from training.segment.scenes import Classes, Scenes, SceneSet, classes_of

#: Of the test: what is written is fp16, and loaded into fp32 to be served.
_PRECISION = "fp16 weights, fp32 forward"


def segment(config: SegmentConfig, folder: Path) -> Path:
    """Train a segmenter and return its task folder.

    Raises:
        BackboneError, DataError, ConfigError: before any compute is spent.
        loop.TrainingError: if training cannot go on.
    """
    longer = refuse_other_run(folder, config)
    finished = folder / "task"
    if longer or not (finished / "task.json").exists():
        _make(config, folder, finished)
    _test(config, folder, finished)
    return finished


def check_inputs(config: SegmentConfig, backbone: Backbone) -> tuple[Classes, dict[str, SceneSet]]:
    """Return the classes and the splits.

    Raises:
        ConfigError, DataError, RateError, ReductionError: naming what does not fit together.
    """
    classes = classes_of(config.scenes)
    try:
        described(config, backbone, classes)
    except ValidationError as error:
        raise ConfigError(first_fault(error)) from error
    names = [config.train, config.test, *([] if config.unseen is None else [config.unseen])]
    return classes, {name: SceneSet(config.scenes, name, classes) for name in names}


def _make(config: SegmentConfig, folder: Path, finished: Path) -> None:
    say(f"loading {config.backbone.name}")
    backbone = load_backbone(config.backbone.name, config.backbone.architecture)
    tuned_from = backbone.digest  # before its weights change
    classes, splits = check_inputs(config, backbone)
    mean, std = backbone.data_config["mean"], backbone.data_config["std"]
    transform = SceneTransform(mean, std, TrainScene(config.augment, mean))
    scenes = Scenes(splits[config.train], transform, config.loop.on_unreadable)
    keys = scenes.keys()
    steps = config.loop.over(len(keys))
    accelerator = loop.start(steps, folder)
    say(header(accelerator, steps, config.backbone, scenes, keys, folder))
    backbone.model.to(accelerator.device)
    job = Segmenting(backbone, config, classes)
    if config.unseen is not None:
        unseen = splits[config.unseen]
        count = min(config.watched, len(unseen))
        indices = [i * len(unseen) // count for i in range(count)]
        shown = Shown(job.segmenter(), unseen, indices)
        job.watched = read_unseen(shown.__getitem__, range(len(shown)), config.loop.on_unreadable)
    loop.run(
        accelerator, job, steps, config, scenes, keys, folder, AugmentConfig(crop="evaluation")
    )
    if accelerator.is_main_process:
        notes = _notes(config, backbone, len(keys), folder)
        notes["labels"] = {"first": classes.first, "ignored": list(classes.ignored)}
        info = job.info.model_copy(update={"training": notes})
        if config.method == "full":
            encoder = _save_encoder(config, job, backbone, tuned_from, notes, folder / "model")
            info = info.model_copy(update={"backbone": BackboneInfo.of(encoder)})
        SegmentationModel(info, job.tensors()).save(finished)
    accelerator.wait_for_everyone()


def _save_encoder(
    config: SegmentConfig,
    job: Segmenting,
    backbone: Backbone,
    tuned_from: str,
    notes: dict[str, Any],
    folder: Path,
) -> Backbone:
    """Write a tuned encoder, without the classifier that it had, and return it as it is read."""
    if not folder.exists():  # a run that was killed just after has the same one
        backbone.model.reset_classifier(0)
        part = part_of(job.ladder)
        said = {
            "source_rate": config.source,
            **({} if part is None else {"ladder": part.model_dump(mode="json")}),
            **({} if config.proportional else {"proportional": False}),
            "backbone_digest": tuned_from,
            "training": notes,
        }
        save_model(backbone, said, folder)
    return load_backbone(str(folder))


def load_segmenter(
    name: str, architecture: str | None, task: Path | str, device: torch.device | str
) -> Segmenter:
    """Return a written segmenter, on a device."""
    return open_segmentation(task).on(load_backbone(name, architecture, device))


def _test(config: SegmentConfig, folder: Path, finished: Path) -> None:
    """Test what was written as it was written, and add the figures to what is said of it."""
    path = finished / "task.json"
    said = json.loads(path.read_text(encoding="utf-8"))
    if "test" in said["training"]:
        return
    state = PartialState()
    full = config.method == "full"
    segmenter = load_segmenter(
        str(folder / "model") if full else config.backbone.name,
        None if full else config.backbone.architecture,
        finished,
        state.device,
    )
    scenes = SceneSet(config.scenes, config.test, classes_of(config.scenes))
    say(f"testing on {scenes.path}")
    with torch.inference_mode():
        sums = count_all(segmenter, Shown(segmenter, scenes, range(len(scenes))))
    if state.is_main_process:
        found = figures(sums, segmenter.info.class_names) | {"pictures": len(scenes)}
        said["training"] |= {"test": found, "test_precision": _PRECISION}
        replace_file(path, json.dumps(said, indent=2, ensure_ascii=False) + "\n")
    state.wait_for_everyone()


class Shown(Sequence[tuple[Tensor, Tensor]]):
    """Scenes as a segmenter sees them, read when they are asked for."""

    def __init__(self, segmenter: Segmenter, scenes: SceneSet, indices: Sequence[int]) -> None:
        """Take some scenes of a split, by their numbers."""
        self.indices = indices
        self.transform = scene_transform(segmenter)
        self.scenes = Scenes(scenes, self.transform)
        self.finish = self.transform.finish("cpu")

    def __len__(self) -> int:
        """Return their number."""
        return len(self.indices)

    def __getitem__(self, index: Any) -> Any:
        """Return a normalised picture [3, H, W] and its labels [H', W'] as they are."""
        picture, labels, _ = self.scenes[Draw(0, self.indices[index])]
        return self.finish(picture[None])[0], labels


def scene_transform(segmenter: Segmenter) -> SceneTransform:
    """Return what becomes of scenes that a segmenter is measured on."""
    config = segmenter.backbone.data_config
    return SceneTransform(config["mean"], config["std"], TestScene(segmenter.size))


def scene_batches(
    segmenter: Segmenter, scenes: SceneSet, indices: Any, batch_size: int, workers: int
) -> Batches:
    """Return lists of (normalised picture [3, H, W], its labels [H', W'] as they are)."""
    transform = scene_transform(segmenter)
    draws = [Draw(0, index) for index in indices]
    return Batches(
        Scenes(scenes, transform), workers, batch_size=batch_size, sampler=draws,
        collate_fn=Normalised(transform),
    )  # fmt: skip


class Normalised:
    """Makes batches of scenes that may differ in size."""

    def __init__(self, transform: SceneTransform) -> None:
        """Take what normalises."""
        self.finish = transform.finish("cpu")

    def __call__(self, items: list[tuple[Tensor, Tensor, int]]) -> list[tuple[Tensor, Tensor]]:
        """Return pictures and labels, without how many were passed over."""
        return [(self.finish(picture[None])[0], labels) for picture, labels, _ in items]


def _notes(
    config: SegmentConfig, backbone: Backbone, pictures: int, folder: Path
) -> dict[str, Any]:
    """Return what is worth knowing of a run beside what came out."""
    recipe = config.model_dump(mode="json", exclude={"backbone", "ladder"})
    recipe["scenes"] = {"name": Path(config.scenes.path).name}  # a path says nothing elsewhere
    return {
        "recipe": recipe,
        "backbone": backbone.architecture,
        "pictures": pictures,
        "seconds": round(sum(line["seconds"] for line in read_metrics(folder)), 1),
    }
