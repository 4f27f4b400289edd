"""Loading the models of a server: backbones once each, then tasks and banks on them."""

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

import torch
from pydantic import ValidationError
from timm.data.transforms_factory import create_transform

from adapters import Store, TaskModel, open_bank, open_task
from adapters.schema import first_fault
from adapters.segmentation import SegmentationModel, is_segmentation, open_segmentation
from server.engine.rates import Controller
from server.engine.slackfit import SlackFit
from server.engine.threads import available_processors, set_torch_threads
from server.engine.times import ServiceTimes
from server.int8.calibration import Calibration
from server.int8.processor import lacks_int8
from server.models.cascades import check_cascade, open_cascade
from server.models.graphs import Graphs
from server.models.ladders import are_same, open_ladders
from server.models.segmenting import ServedSegmenter, scene_transform
from server.models.served import ServedModel
from server.models.weights import Backbones
from server.progress import Progress, Tell, tell_nobody
from server.schemas import Evaluation
from server.settings import ModelSettings, Settings
from tocom import Backbone, ConfigError, Ladder, cost

logger = logging.getLogger(__name__)

#: How rates are chosen where requests leave that to the server, by the setting's names.
POLICIES: Mapping[str, type[Controller]] = {"arrivals": Controller, "slackfit": SlackFit}


def load_models(settings: Settings, tell: Tell = tell_nobody) -> list[ServedModel]:
    """Load all models of a server, where its settings say.

    From here on one torch thread is all that the process's threads get, but for forwards. OpenMP's
    threads wait awake for their next operation, of which a forward has hundreds, only as long as
    all that it ever started have a core each: a second team, however idle, makes them sleep in
    between, and a forward take up to twice as long.

    Args:
        settings: say which and where.
        tell: is told which one is being loaded.

    Raises:
        TocomError: if one cannot be loaded, or there is no such device.
    """
    device = settings.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"models cannot run on device {device!r}: {reason}") from error
    # Torch's own choice is a bound, too: OMP_NUM_THREADS may say it.
    threads = settings.threads or min(available_processors(), torch.get_num_threads())
    if torch.device(device).type != "cpu":
        threads = 1  # which have no part in what runs there
    set_torch_threads(1)
    store = Store(settings.store)
    batch, slo = settings.max_batch, settings.slo_ms / 1000
    backbones = Backbones(device, _graphs(settings, threads), settings.max_folded_bytes)
    models = []
    for each in settings.models:
        tell(Progress(each.name))
        models.append(load_model(each, backbones, batch, slo, store, settings.auto_policy))
    return models


def _graphs(settings: Settings, threads: int) -> Graphs:
    if settings.graph_dtype != "int8":
        return Graphs(
            settings.max_graphs, dtype=getattr(torch, settings.graph_dtype), threads=threads
        )
    if lacks_int8():
        logger.warning(
            "graph_dtype=int8 is not used: this processor has neither VNNI nor AMX, without which "
            "int8 would be slower and wrong; compiled forwards compute in float32"
        )
        return Graphs(settings.max_graphs, threads=threads)
    calibration = Calibration(settings.int8_pictures)
    return Graphs(settings.max_graphs, threads=threads, measure=calibration)


def load_model(
    settings: ModelSettings,
    backbones: Backbones | None = None,
    max_batch: int = 16,
    slo: float = math.inf,
    store: Store | None = None,
    policy: str = "arrivals",
) -> ServedModel:
    """Load a model, its task and its bank.

    Args:
        settings: what to load.
        backbones: those that are loaded, on the device where it runs; default: none, on the CPU.
        max_batch: images in a forward, which its controller plans with.
        slo: seconds in which answers are wanted, likewise.
        store: where references to published banks are looked up.
        policy: how its controller chooses rates: a key of `POLICIES`.

    Raises:
        TocomError: if one cannot be loaded or they do not fit together.
    """
    backbones = backbones or Backbones()
    backbone, deltas = backbones.get(settings.backbone, settings.architecture)
    task: TaskModel | SegmentationModel | None = None
    segmenter = None
    if settings.task is not None and is_segmentation(settings.task):
        task = open_segmentation(settings.task)
        segmenter = task.on(backbone)
        backbone = segmenter.backbone
    elif settings.task is not None:
        task = open_task(settings.task)
        backbone = task.on(backbone)
        if task.info.method == "lora":  # it has changed weights that deltas are added to
            deltas = backbones.deltas(backbone)
    if segmenter is None and not backbone.class_names:
        raise ConfigError(
            f"model {settings.name!r}: {settings.backbone} has no classification head; "
            "tune it on a task first"
        )
    bank = open_bank(settings.bank, store) if settings.bank is not None else None
    opened = open_ladders(settings, backbone, bank)
    source, tuned_on = backbone.source, backbone.ladder
    if settings.source is not None:
        source, tuned_on = settings.source, opened[0].ladder if bank is None else bank.ladder
    if source and not any(are_same(each.ladder, tuned_on) for each in opened):
        raise ConfigError(
            f"model {settings.name!r} was tuned at rate {source} of the ladder {tuned_on.name!r}: "
            "name that among its ladders, too, or say source, a rate of its own"
        )
    make: Callable[..., ServedModel] = ServedModel
    size = backbone.input_size[1:]
    if segmenter is None:
        transform = create_transform(**backbone.data_config, is_training=False)
        evaluation = _evaluation(settings.name, backbone)
    else:
        make = partial(ServedSegmenter, segmenter=segmenter)
        size = segmenter.info.window
        transform, evaluation = scene_transform(segmenter), None
    cascade = open_cascade(settings)
    first, *others = (
        make(
            name=settings.name,
            backbone=backbone,
            bank=None,
            source=source if are_same(each.ladder, tuned_on) else 0,
            transform=transform,
            controller=POLICIES[policy](_times(backbone, size, each.ladder), max_batch, slo),
            deltas=deltas,
            graphs=backbones.graphs,
            task=task.info if task is not None else None,
            evaluation=evaluation,
            ladder=each.ladder,
            evidence=each.evidence,
            cascade=cascade,
        )
        for each in opened
    )
    model = replace(first, others=tuple(others)).with_bank(bank)
    check_cascade(model, settings)
    return model


def _times(backbone: Backbone, size: tuple[int, int], ladder: Ladder) -> ServiceTimes:
    return ServiceTimes(lambda rate: cost(backbone.model, rate, size, ladder=ladder).macs)


def _evaluation(name: str, backbone: Backbone) -> Evaluation | None:
    """Return the model's evaluation; one that cannot be shown is no reason not to serve."""
    if backbone.evaluation is None:
        return None
    try:
        return Evaluation.model_validate(backbone.evaluation)
    except ValidationError as error:
        logger.warning("model %r: its evaluation is not shown: %s", name, first_fault(error))
        return None
