"""Fine-tuning a backbone on a labelled task, at any source rate.

What comes out: of `full` a model folder in timm's own form, which `load_backbone` and timm load;
of the other methods a task folder (`adapters.task`), which holds only what was tuned. Both say at
which rate that was. A search trains once for each of its values on a part of the pictures and
measures on another part; the best value is then trained on all. The labels of the test pictures
are read once, when the result is written: it is the written one that is tested.

Reference: ToCom, Table 3 (recipes) and section 4.1 (search on 800/200, test once).
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object, reduce
from safetensors.torch import save_file
from timm.models import save_for_hf
from torch import Tensor

from adapters import BackboneInfo, TaskInfo, TaskModel
from adapters.durable import new_folder, replace_file
from adapters.ladder import part_of
from adapters.task import data_config
from tocom import Backbone, ConfigError, DataError, Variant, load_backbone
from tocom.backbones import REDUCTION
from tocom.pruned import Channels
from tocom.reduction import DynamicViT
from tocom.vit import embed, outputs
from training import loop
from training.config import FinetuneConfig
from training.ladders.chosen import chosen_ladder
from training.learned.dynamicvit import check_teacher
from training.learned.weights import check_learns
from training.multi_label.measures import mean_average_precision
from training.pictures.augment import train_transform
from training.pictures.batches import Pictures, evaluation_batches
from training.pictures.config import PicturesConfig
from training.pictures.sets import class_names, open_pictures
from training.run_folder import TrainingError, read_metrics, refuse_other_run
from training.screen.header import header
from training.screen.progress import following, say
from training.seeds import derive
from training.tuning import Finetuning

Keys = Sequence[tuple[int, int]]
#: Of the test: what is written is fp16, and loaded into fp32 to be served.
_PRECISION = "fp16 weights, fp32 forward"


def finetune(config: FinetuneConfig, folder: Path) -> Path:
    """Fine-tune and return the model folder, or the task folder.

    Raises:
        BackboneError, DataError, ConfigError: before any compute is spent.
        loop.TrainingError: if training cannot go on.
    """
    longer = refuse_other_run(folder, config)
    full = config.method == "full"
    finished = folder / ("model" if full else "task")
    described = finished / ("config.json" if full else "task.json")
    if longer or not described.exists():
        _make(config, folder, finished)
    _test(config, described)
    return finished


def _make(config: FinetuneConfig, folder: Path, finished: Path) -> None:
    say(f"loading {config.backbone.name}")
    classes = check_inputs(config)
    asked = config
    if config.search and config.search.values:
        config = _searched(config, classes, folder / "search")
    backbone = _load(config)
    described = BackboneInfo.of(backbone)  # before its weights change
    pictures = _pictures(config, config.pictures, backbone)
    keys = pictures.keys()
    job, accelerator = _train(config, asked, backbone, pictures, keys, classes, folder)
    if accelerator.is_main_process:
        notes = _notes(config, backbone, len(keys), folder)
        if config.method == "full":
            _save_model(config, job, backbone, described.digest, classes, notes, finished)
        else:
            _save_task(config, job, described, classes, notes, finished)
    accelerator.wait_for_everyone()


def _test(config: FinetuneConfig, described: Path) -> None:
    """Test what was written as it was written, and add how good it is to what is said of it."""
    said = json.loads(described.read_text(encoding="utf-8"))
    figure = "test_map" if config.many else "test_accuracy"
    if figure in said["training"]:
        return
    state = PartialState()
    if config.method == "full":
        tuned = load_backbone(str(described.parent), device=state.device)
    else:
        backbone = load_backbone(config.backbone.name, config.backbone.architecture, state.device)
        tuned = TaskModel.load(described.parent).on(backbone)
    quality = _quality(tuned, tuned.source, config.test, config.loop.workers)
    if state.is_main_process:
        said["training"] |= {figure: quality, "test_precision": _PRECISION}
        replace_file(described, json.dumps(said, indent=2, ensure_ascii=False) + "\n")
    state.wait_for_everyone()


def check_inputs(config: FinetuneConfig) -> list[str]:
    """Return the names of the classes.

    Raises:
        BackboneError, ConfigError, DataError, RateError, ReductionError: naming what does not fit
            together.
    """
    search = config.search
    for part in (
        config.pictures,
        config.test,
        *((search.train, search.validation) if search else ()),
    ):
        if part is not None and part.times > 1:
            raise ConfigError(
                f"{part.path}: times is {part.times}, and every picture of a fine-tuning counts "
                "once: leave it out, and give more loop.epochs"
            )
    backbone = _load(config)
    ladder = chosen_ladder(config.ladder, backbone.model)
    Variant(config.source, ladder=ladder).plan(
        backbone.model, backbone.model.patch_embed.num_patches + backbone.model.num_prefix_tokens
    )  # refuses a source that the ladder does not have
    check_learns(ladder, config.source, backbone.model)
    train_transform(backbone, config.augment)  # refuses what timm does not know
    names = class_names(open_pictures(config.pictures))
    if config.classes is not None:
        if len(names) > config.classes:
            raise DataError(
                f"{config.pictures.path} has {len(names)} classes and the head {config.classes}"
            )
        # Classes of a list are numbers, of which a small one may lack the last.
        names += [str(label) for label in range(len(names), config.classes)]
    if config.search and config.search.train and config.search.validation:
        for part in (config.search.train, config.search.validation):
            if len(class_names(open_pictures(part))) > len(names):
                raise DataError(f"{part.path}, {part.list}: more classes than the {len(names)}")
    _check_test(config, names)
    if isinstance(ladder.method, DynamicViT):
        check_teacher(config.dynamicvit, len(names), backbone, config.many)
    return names


def _check_test(config: FinetuneConfig, names: list[str]) -> None:
    """Check as much of the test pictures as can be known without their labels."""
    test = config.test
    if test.list is None:
        other = class_names(open_pictures(test))
        # Of classes that are numbers a small set may lack the last.
        if other != names[: len(other) if all(name.isdigit() for name in other) else None]:
            raise DataError(
                f"{config.pictures.path} has {len(names)} classes and {test.path} {len(other)}; "
                "they must be the same"
            )
        return
    path = Path(test.path)
    file = (path if path.is_dir() else path.parent) / test.list
    for needed in (path, file):
        if not needed.exists():
            raise DataError(f"there is no {needed} to test on")


def _searched(config: FinetuneConfig, classes: list[str], folder: Path) -> FinetuneConfig:
    """Return the recipe with the value that is the best on the validation pictures.

    The first of the best, where several are as good.
    """
    assert config.search is not None
    found: dict[float, float] = {}
    figure = "map" if config.many else "top1"
    for value in config.search.values:
        candidate, run = config.candidate(value), folder / f"{config.search.key}={value:g}"
        result = run / "result.json"
        if refuse_other_run(run, candidate) or not result.exists():
            say(f"searching: trying {config.search.key}={value:g}")
            backbone = _load(candidate)
            train, train_keys, validation, validation_keys = _split(candidate, config, backbone)
            job, accelerator = _train(
                candidate, candidate, backbone, train, train_keys, classes, run
            )
            quality = _quality(
                job.tuned(backbone), candidate.source, validation, config.loop.workers,
                validation_keys,
            )  # fmt: skip
            if accelerator.is_main_process:
                replace_file(result, json.dumps({"value": value, figure: quality}) + "\n")
            accelerator.wait_for_everyone()
        found[value] = json.loads(result.read_text(encoding="utf-8"))[figure]
    return config.candidate(max(found, key=lambda value: found[value]))


def _split(
    candidate: FinetuneConfig, config: FinetuneConfig, backbone: Backbone
) -> tuple[Pictures, Keys, PicturesConfig, Keys | None]:
    """Return what a search trains on and what it measures on, with the keys of both."""
    search = config.search
    assert search is not None
    if search.train and search.validation:
        pictures = _pictures(candidate, search.train, backbone)
        return pictures, pictures.keys(), search.validation, None
    pictures = _pictures(candidate, config.pictures, backbone)
    keys = pictures.keys()
    generator = torch.Generator().manual_seed(derive(config.loop.seed, "split", 0))
    order = torch.randperm(len(keys), generator=generator).tolist()
    held = {keys[i] for i in order[: max(1, round(search.share * len(keys)))]}
    seen = [key for key in keys if key not in held]
    if not seen:
        raise DataError(f"{config.pictures.path}: {len(keys)} pictures are too few for a search")
    pictures.held_out = frozenset(held)  # they do not stand in for unreadable ones either
    return pictures, seen, config.pictures, sorted(held)


def _train(
    config: FinetuneConfig,
    asked: FinetuneConfig,
    backbone: Backbone,
    pictures: Pictures,
    keys: Keys,
    classes: list[str],
    folder: Path,
) -> tuple[Finetuning, Any]:
    """Train on the pictures of these keys; return the job and the devices.

    The run folder is told `asked`, the recipe before its search.
    """
    schedule = config.loop.over(len(keys))
    accelerator = loop.start(schedule, folder)
    say(header(accelerator, schedule, config.backbone, pictures, keys, folder))
    backbone.model.to(accelerator.device)
    job = Finetuning(backbone, config, len(classes))
    loop.run(accelerator, job, schedule, asked, pictures, list(keys), folder, config.augment)
    return job, accelerator


def _load(config: FinetuneConfig) -> Backbone:
    backbone = load_backbone(config.backbone.name, config.backbone.architecture)
    backbone.model.pretrained_cfg |= data_config(config.resize, config.crop_pct)
    return backbone


def _pictures(config: FinetuneConfig, part: PicturesConfig, backbone: Backbone) -> Pictures:
    transform = train_transform(backbone, config.augment)
    return Pictures([part], transform, config.loop.on_unreadable)


def _notes(
    config: FinetuneConfig, backbone: Backbone, pictures: int, folder: Path
) -> dict[str, Any]:
    """Return what is worth knowing of a run beside what came out."""
    # Paths say nothing elsewhere; the ladder is said beside the notes.
    paths = {"pictures", "test", "backbone", "search", "ladder"}
    return {
        "recipe": config.model_dump(mode="json", exclude=paths),
        "backbone": backbone.architecture,
        "pictures": pictures,
        "seconds": round(sum(line["seconds"] for line in read_metrics(folder)), 1),
    }


def save_model(backbone: Backbone, said: dict[str, Any], folder: Path) -> None:
    """Write a model folder in timm's own form, in fp16, with what is `said` in its config.

    What a method has learned lies beside the model.
    """
    if (channels := Channels.of(backbone.model)) is not None:
        said |= {"pruned": channels.said}
    with new_folder(folder, TrainingError) as beside:
        save_for_hf(backbone.model.half(), str(beside), model_config=said, safe_serialization=True)
        if backbone.learned is not None:
            tensors = {
                name: x.detach().cpu().half() for name, x in backbone.learned.tensors.items()
            }
            save_file(tensors, beside / REDUCTION)


def _save_model(
    config: FinetuneConfig,
    job: Finetuning,
    backbone: Backbone,
    tuned_from: str,
    classes: list[str],
    notes: dict[str, Any],
    folder: Path,
) -> None:
    part = part_of(job.ladder)
    said = {
        "label_names": classes,
        "source_rate": config.source,
        **({} if part is None else {"ladder": part.model_dump(mode="json")}),
        **({} if job.proportional else {"proportional": False}),
        **({"multi_label": True} if config.many else {}),
        "backbone_digest": tuned_from,
        "training": notes,
    }
    save_model(job.tuned(backbone), said, folder)


def _save_task(
    config: FinetuneConfig,
    job: Finetuning,
    backbone: BackboneInfo,
    classes: list[str],
    notes: dict[str, Any],
    folder: Path,
) -> None:
    rank, scale = {
        "adaptformer": (config.adaptformer.bottleneck, config.adaptformer.scale),
        "lora": (config.lora.rank, config.lora.alpha / config.lora.rank),
    }.get(config.method, (None, 1.0))
    info = TaskInfo(
        name=config.name,
        method=config.method,
        backbone=backbone,
        source=config.source,
        ladder=part_of(job.ladder),
        proportional=job.proportional,
        multi_label=config.many,
        class_names=tuple(classes),
        heads=job.heads,
        rank=rank,
        layers=config.lora.layers if config.method == "lora" else (),
        scale=scale,
        resize=config.resize,
        crop_pct=config.crop_pct,
        training=notes,
    )
    TaskModel(info, job.tensors()).save(folder)


@torch.inference_mode()
def _quality(
    backbone: Backbone, rate: int, part: PicturesConfig, workers: int, keys: Keys | None = None
) -> float:
    """Return how good answers are at a rate, of all pictures or of those of these keys.

    That is the share of right ones, or of several classes a picture the mean average precision.
    All processes call it, each takes its share of the pictures, and all get the same answer.

    Raises:
        DataError: if a picture has a class that the model lacks.
    """
    state = PartialState()
    variant = Variant(
        rate, None, backbone.adapter, backbone.proportional, backbone.ladder, backbone.learned
    )
    seen: list[tuple[Tensor, Tensor]] = []  # scores and truth, where there are several classes
    batches = evaluation_batches(
        backbone, [part], keys, workers=workers,
        process=state.process_index, processes=state.num_processes,
    )  # fmt: skip
    say(f"testing what was tuned on {part.list or part.path}")
    counts = torch.zeros(2, device=state.device)  # right answers, pictures
    for images, labels in following(batches, "testing", "batch"):
        tokens = embed(backbone.model, images.to(state.device, non_blocking=True))
        logits = outputs(backbone.model, tokens, variant).logits
        highest = labels.shape[1] - 1 if backbone.multi_label else int(labels.max())
        if highest >= logits.shape[1]:
            raise DataError(
                f"{part.list or part.path} has the class {highest}; the model has "
                f"{logits.shape[1]}, from 0"
            )
        if backbone.multi_label:
            seen.append((logits[:, : labels.shape[1]].cpu(), labels))
            continue
        counts[0] += (logits.argmax(dim=-1) == labels.to(state.device)).sum()
        counts[1] += len(labels)
    if backbone.multi_label:
        scores, truth = zip(*gather_object(seen), strict=True)
        return round(mean_average_precision(torch.cat(scores), torch.cat(truth)), 4)
    correct, total = map(int, reduce(counts, reduction="sum").tolist())
    return round(correct / total, 4)
