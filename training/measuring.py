"""What evaluation and calibration share: a pass over pictures, a model at many rates.

A batch is embedded once for all its forwards. The sums of a pass are kept in the run folder
after every batch: a killed pass goes on where it stopped, to the same figures. What is summed
is not known here.
"""

import functools
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from timm.data import ImageNetInfo, infer_imagenet_subset
from torch import Tensor

from adapters import Bank, compose, open_task
from adapters.bank import learned_with
from adapters.durable import replace_file
from adapters.task import data_config
from tocom import (
    TOME,
    AnyDelta,
    Backbone,
    ConfigError,
    DataError,
    FoldedWeights,
    Ladder,
    Variant,
    cost,
    fold,
    load_backbone,
)
from tocom.vit import embed, outputs
from training.config import BackboneConfig
from training.multi_label.measures import compare_many
from training.pictures.batches import evaluation_batches
from training.pictures.config import PicturesConfig
from training.pictures.sets import class_names, open_pictures
from training.recipe import Recipe, differing
from training.run_folder import OtherRunError, refuse_other_measurement
from training.screen.progress import Progress, say

MEASURES = ("top1", "agreement", "kl")
MANY_CLASSES = "scores several classes a picture"
#: How long processes that are done wait for others: an evaluation may take hours.
_PATIENCE = timedelta(days=1)
_KEPT_BYTES = 2**31  # of folded weights: a large model's at all pairs of rates are far more


class Measurement:
    """A model and the pictures that it is shown."""

    def __init__(
        self,
        backbone: Backbone,
        pictures: PicturesConfig,
        batch_size: int,
        workers: int,
        labelled: bool,
        limit: int | None = None,
        ladder: Ladder = TOME,
        proportional: bool = True,
        bank: Bank | None = None,
    ) -> None:
        """Open the pictures.

        Args:
            backbone: the model.
            pictures: what it is shown.
            batch_size: pictures in one forward.
            workers: processes that decode pictures.
            labelled: whether the pictures' classes are the model's.
            limit: so many pictures, spread evenly over all; None: all.
            ladder: what the rates mean.
            proportional: whether merged tokens count in attention by their size.
            bank: that it runs with.

        Raises:
            DataError: if they cannot be read, or have other classes than the model.
        """
        self.backbone, self.pictures, self.ladder = backbone, pictures, ladder
        self.proportional, self.learned = proportional, learned_with(backbone, bank)
        self.batch_size, self.workers = batch_size, workers
        available = len(open_pictures(pictures))
        self.count = min(available, limit or available)
        self.keys = [(0, i * available // self.count) for i in range(self.count)]
        if labelled and backbone.multi_label != (pictures.labels == "many"):
            raise DataError(
                f"{backbone.name} "
                f"{MANY_CLASSES if backbone.multi_label else 'answers one class a picture'}, and "
                f"{pictures.path} has labels={pictures.labels}; labelled=false does without"
            )
        self.classes = torch.tensor(class_indices(pictures, backbone)) if labelled else None
        counted = functools.partial(cost, backbone.model, ladder=ladder, adapter=backbone.adapter)
        self.cost = functools.cache(counted)
        self._bar: Any = None

    @torch.inference_mode()
    def total(
        self,
        path: Path,
        rates: Sequence[int],
        figures: Callable[[Tensor, Tensor | None], Tensor],
        resume: bool = True,
    ) -> Tensor:
        """Return the sum over all pictures of what `figures` makes of their batches.

        All processes call it, each takes its share of the pictures, and all get the same answer.

        Args:
            path: where the sums so far are kept, and read if they are there. Of several processes
                each has a file of its own beside it.
            rates: those of all forwards that `figures` runs, for the progress bar.
            figures: from embedded tokens [B, N, D] and the model's classes [B], of several a
                picture [B, C], None without labels, to sums over the batch.
            resume: whether to go on after the sums so far; else all begins anew.

        Raises:
            ConfigError: if the sums so far are of other pictures.
        """
        processes = PartialState()
        keys = self.keys[processes.process_index :: processes.num_processes]
        if processes.num_processes > 1:
            number = f"{processes.process_index + 1}-of-{processes.num_processes}"
            path = path.with_stem(f"{path.stem}-{number}")
        done, sums = self._resume(path, resume)
        macs = sum(self.cost(rate).macs for rate in rates)
        batches = evaluation_batches(
            self.backbone, [self.pictures], keys[done:], self.batch_size, self.workers
        )
        with Progress("measuring", len(keys) * macs, "MAC", done * macs) as self._bar:
            for images, folders in batches if done < len(keys) else ():
                tokens = embed(self.backbone.model, images.to(self._device, non_blocking=True))
                classes = None if self.classes is None else self.truth(folders).to(self._device)
                sums = sums + figures(tokens, classes).cpu()
                done += len(images)
                state = {"done": done, "of": self.count, "sums": sums.tolist()}
                replace_file(path, json.dumps(state) + "\n")
        total: Tensor = sum(gather_object([sums]))
        return total

    def truth(self, folders: Tensor) -> Tensor:
        """Return the model's classes [B] of folders [B], of several a picture [B, C] both.

        Raises:
            DataError: if a picture has none.
        """
        assert self.classes is not None
        if not self.backbone.multi_label:
            if (folders < 0).any():
                raise DataError(
                    f"{self.pictures.path} has pictures without a class; labelled=false does "
                    "without classes"
                )
            return self.classes[folders]
        truth = torch.zeros(len(folders), len(self.backbone.class_names))
        truth[:, self.classes] = folders
        return truth

    def compare(self, answer: Tensor, reference: Tensor, classes: Tensor | None) -> Tensor:
        """Return what `compare` does for the answers of this model."""
        return compare(answer, reference, classes, self.backbone.multi_label)

    def logits(self, tokens: Tensor, rate: int, delta: AnyDelta | None = None) -> Tensor:
        """Return the logits [B, classes] of embedded tokens, and move the progress bar."""
        variant = Variant(
            rate, delta, self.backbone.adapter, self.proportional, self.ladder, self.learned
        )
        answer = outputs(self.backbone.model, tokens, variant).logits
        self._bar.update(len(tokens) * self.cost(rate).macs)
        return answer

    @property
    def labelled(self) -> bool:
        """Whether top-1 is measured."""
        return self.classes is not None

    @property
    def described(self) -> dict[str, Any]:
        """What results say of the pictures."""
        return {"name": Path(self.pictures.path).name, "count": self.count}

    @property
    def _device(self) -> torch.device:
        device: torch.device = next(self.backbone.model.parameters()).device
        return device

    def _resume(self, path: Path, resume: bool) -> tuple[int, Tensor]:
        for leftover in path.parent.glob(f".{path.name}.*"):  # of a write that was killed
            leftover.unlink()
        if not path.exists() or not resume:
            return 0, torch.zeros((), dtype=torch.float64)
        state = json.loads(path.read_text(encoding="utf-8"))
        if state["of"] != self.count:
            raise OtherRunError(
                f"{path.parent} was begun with {state['of']} pictures of {self.pictures.path}; "
                f"there are {self.count} now; choose another run folder"
            )
        return state["done"], torch.tensor(state["sums"], dtype=torch.float64)


class FoldedDeltas:
    """A bank's deltas, folded into the weights of a model: made once, as far as memory allows."""

    def __init__(self, backbone: Backbone, bank: Bank) -> None:
        """Remember the arguments; nothing is folded yet."""
        self.backbone, self.bank = backbone, bank
        self._kept: dict[tuple[int, int, float], FoldedWeights] = {}
        self._bytes = 0

    def __call__(self, source: int, target: int, scale: float) -> FoldedWeights:
        """Return the weights with Δ(source→target) at a multiplier."""
        key = (source, target, scale)
        if (kept := self._kept.get(key)) is not None:
            return kept
        folded = fold(self.backbone.model, compose(self.bank, source, target, scale))
        self._bytes += sum(weight.nbytes for weight in folded.weights.values())
        if self._bytes <= _KEPT_BYTES:
            self._kept[key] = folded
        return folded


def refuse_processes(command: str) -> None:
    """Refuse to measure the same into the same folder many times.

    Raises:
        ConfigError: under torchrun or `accelerate launch` with several processes.
    """
    if (processes := os.environ.get("WORLD_SIZE", "1")) != "1":
        raise ConfigError(
            f"{command} runs in one process, got {processes} of torchrun or accelerate launch; "
            f"start it with: tocom-train {command}"
        )


def load_model(config: BackboneConfig, task: str | None, crop_pct: float | None = None) -> Backbone:
    """Load a model for measuring, onto a GPU if there is one: each of several processes its own.

    Args:
        config: which model.
        task: the task that it is given, if there is one.
        crop_pct: share of a picture's shorter side that it sees; None: as the model says.
    """
    processes = PartialState(cpu=not torch.cuda.is_available(), timeout=_PATIENCE)
    device = processes.device if torch.cuda.is_available() else "cpu"
    say(f"loading {config.name}{f' and {task}' if task else ''}, onto {device}")
    backbone = load_backbone(config.name, config.architecture, device)
    if task:
        backbone = open_task(task).on(backbone)
    backbone.model.pretrained_cfg |= data_config("crop", crop_pct)
    return backbone


def claim(
    folder: Path,
    result: str,
    recipe: Recipe,
    backbone: Backbone,
    bank: Bank | None,
    multipliers: Mapping[str, float] | None = None,
    others: Mapping[str, Sequence[str]] | None = None,
) -> bool:
    """Write down in a run folder what is measured there.

    Args:
        folder: the run folder.
        result: name of the file that is there when all is measured.
        recipe, backbone, bank: what is measured.
        multipliers: those that the model's calibration puts in place of the bank's own.
        others: digests of what else is measured, by its name.

    Returns:
        Whether the folder holds its result already.

    Raises:
        ConfigError: naming what differs, if something else was measured there.
    """
    said = {
        "recipe": recipe.model_dump(mode="json"),
        "weights_digest": backbone.digest,
        "task_digest": backbone.task_digest,
        "bank_digest": bank.info.digest if bank else None,
        "multipliers": multipliers or {},
        "others": others or {},
    }
    text = json.dumps(said, indent=2, ensure_ascii=False) + "\n"
    finished = (folder / result).exists()
    if then := refuse_other_measurement(folder, recipe):
        _check_same(folder, then, json.loads(text))
        return finished
    if finished:
        raise ConfigError(
            f"{folder} holds {result} and no config.json that says what was measured; "
            "choose another run folder"
        )
    folder.mkdir(parents=True, exist_ok=True)
    if PartialState().is_main_process:
        replace_file(folder / "config.json", text)
    return False


def compare(
    answer: Tensor, reference: Tensor, classes: Tensor | None, many: bool = False
) -> Tensor:
    """Return each picture's top-1 (0 or 1), agreement (0 or 1) and KL divergence in nats.

    Args:
        answer, reference: logits [B, C].
        classes: [B]; without them, top-1 is 0.
        many: whether each class is scored by itself; see `compare_many`.

    Returns:
        [B, 3] in the order of `MEASURES`; KL is KL(reference ‖ answer).
    """
    if many:
        return compare_many(answer, reference)
    log_answer, log_reference = answer.float().log_softmax(-1), reference.float().log_softmax(-1)
    kl = (log_reference.exp() * (log_reference - log_answer)).sum(-1)
    top, agreed = answer.argmax(-1), reference.argmax(-1)
    hit = torch.zeros_like(kl) if classes is None else top == classes
    return torch.stack([hit.double(), (top == agreed).double(), kl.double()], dim=-1)


def standard_error(total: float, squares: float, count: int) -> float | None:
    """Return the standard error of a mean from the sums of values and of their squares.

    None for a single value.
    """
    if count < 2:
        return None
    return math.sqrt(max(0.0, squares - total**2 / count) / (count - 1) / count)


def class_indices(
    pictures: PicturesConfig, backbone: Backbone, instead: str = "labelled=false does without"
) -> list[int]:
    """Return the model's class of each folder of a set of pictures.

    Folders are named by class name, of ImageNet's classes also by WordNet number (n01440764), or by
    class number; where none fits, as many folders as classes are taken in their order.

    Args:
        pictures: the set.
        backbone: the model.
        instead: what to do where they do not fit.

    Raises:
        DataError: if the folders cannot be the model's classes.
    """
    names = class_names(open_pictures(pictures))
    count = len(backbone.class_names)
    known = {name: i for i, name in enumerate(backbone.class_names)} | _wordnet_numbers(backbone)
    if all(name in known for name in names):
        return [known[name] for name in names]
    if all(name.isdigit() and int(name) < count for name in names):
        return [int(name) for name in names]
    if len(names) == count:
        return list(range(len(names)))
    raise DataError(
        f"{pictures.path} has {len(names)} folders ({names[0]!r}, ...) that are neither numbers "
        f"nor names of the {count} classes of {backbone.name}; {instead}"
    )


def _wordnet_numbers(backbone: Backbone) -> dict[str, int]:
    """Return ImageNet's names of the model's classes, empty if it has others."""
    if (subset := infer_imagenet_subset(backbone.model)) is None:
        return {}
    info = ImageNetInfo(subset)
    if tuple(info.label_descriptions()) != backbone.class_names:
        return {}  # as many classes of its own
    return {name: i for i, name in enumerate(info.label_names())}


def _check_same(folder: Path, then: dict[str, Any], now: dict[str, Any]) -> None:
    then = now | then  # older versions said less
    for key, what in (
        ("weights_digest", "backbone"),
        ("task_digest", "task"),
        ("bank_digest", "bank"),
        ("multipliers", "calibration of the model"),
    ):
        if then[key] != now[key]:
            raise OtherRunError(
                f"{folder} was measured with another {what} ({key} {then[key]}, now {now[key]}); "
                "choose another run folder"
            )
    if other := differing(then["others"], now["others"]):
        raise OtherRunError(
            f"{folder} was measured with other models, tasks, ladders or banks of "
            f"{', '.join(other)}; choose another run folder"
        )
