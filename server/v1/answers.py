"""From what models and engine say to the shapes that go over the wire."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor
from torch.nn import functional as F

from adapters.ladder import digest
from server.engine.job import Answer
from server.inference.query import ClassifyQuery, EmbedQuery, RateQuery, SegmentQuery
from server.inference.ran import Ran, milliseconds
from server.models.cascades import misfit
from server.models.segmenting import Scene, ServedSegmenter
from server.models.served import ServedModel
from server.schemas import (
    BankSummary,
    CascadeSummary,
    Classification,
    ClassShare,
    Embedding,
    ImageAnswer,
    LadderSummary,
    MergeMap,
    ModelDetail,
    ModelSummary,
    Prediction,
    RateCost,
    Rung,
    Segmentation,
    TaskSummary,
    Timings,
    Tokens,
)
from tocom.reduction import options_of

#: What a class that a picture has scores at least, of a model of several classes a picture.
LIKELY = 0.5


def classification(
    answer: Answer, query: ClassifyQuery, top_k: int, seconds: float, request_id: str
) -> Classification:
    """Describe the answer to one image.

    Args:
        answer: what the engine said.
        query: what was asked.
        top_k: predictions to list.
        seconds: from the request's arrival to now.
        request_id: goes into the answer.
    """
    ran, output = Ran.of(answer), answer.output
    described = Classification(
        predictions=predictions(output.logits, ran.model, top_k),
        **_common(ran, query, seconds, request_id),
    )
    if query.logits:
        described.logits = output.logits.tolist()
    if query.merge_map:
        described.merge_map = _merge_map(ran.model, output.source)
    return described


def embedding(answer: Answer, query: EmbedQuery, seconds: float, request_id: str) -> Embedding:
    """Describe the features of one image; arguments as of `classification`."""
    ran, output = Ran.of(answer), answer.output
    features = ran.model.backbone.embedding(output.features, output.logits)
    if query.normalize:
        features = F.normalize(features, dim=0)
    return Embedding(
        embedding=features.tolist(),
        normalized=query.normalize,
        **_common(ran, query, seconds, request_id),
    )


def segmentation(
    answer: Answer, scene: Scene, query: SegmentQuery, seconds: float, request_id: str
) -> tuple[ImageAnswer, np.ndarray]:
    """Return what ran for a picture, and the class [H, W] of each of its pixels.

    Arguments as of `classification`; it may wait for room, see `Scene.classes`.
    """
    classes = scene.classes(answer.output).numpy()
    return ImageAnswer(**_common(Ran.of_scene(answer), query, seconds, request_id)), classes


def runs(told: ImageAnswer, classes: np.ndarray, names: Sequence[str]) -> Segmentation:
    """Add to what ran the classes [H, W] of pixels, as runs."""
    pixels = classes.ravel()
    begin = np.concatenate([[0], np.flatnonzero(np.diff(pixels)) + 1])
    lengths = np.diff(begin, append=pixels.size)
    counts = np.bincount(pixels, minlength=len(names))
    return Segmentation(
        **told.model_dump(),
        size=classes.shape,
        classes=[
            ClassShare(index=index, label=names[index], share=round(counts[index] / pixels.size, 6))
            for index in np.argsort(-counts, kind="stable").tolist()
            if counts[index]
        ],
        runs=np.stack([pixels[begin], lengths], axis=1).ravel().tolist(),
    )


def predictions(logits: Tensor, model: ServedModel, top_k: int) -> list[Prediction]:
    """Return the `top_k` most likely classes of logits [C], the most likely first.

    Where a picture has several classes, all that are more likely than not are listed.
    """
    every = model.backbone.scores(logits)
    if model.backbone.multi_label:
        top_k = max(top_k, int((every > LIKELY).sum()))
    scores, classes = every.topk(top_k)
    names = model.backbone.class_names
    return [
        Prediction(index=index, label=names[index], score=score)
        for index, score in zip(classes.tolist(), scores.tolist(), strict=True)
    ]


def _common(ran: Ran, query: RateQuery, seconds: float, request_id: str) -> dict[str, Any]:
    """Return the fields that every answer to an image has."""
    plan = ran.cost.plan
    return {
        "model": ran.model.name,
        "ladder": ran.model.ladder.name,
        "method": ran.model.ladder.method.name,
        "asked_rate": query.asked,
        "asked_budget": query.budget,
        "asked_agreement": query.asked_agreement,
        "rate": ran.rate,
        "rates": ran.rates,
        "reason": ran.reason,
        "source_rate": ran.model.source,
        "compensate": ran.compensate,
        "tokens": Tokens(input=plan.tokens_in, blocks=list(plan.tokens), final=plan.tokens[-1]),
        "macs": ran.macs,
        "macs_ratio": ran.macs_ratio,
        "timings_ms": Timings(
            decode=ran.decode_ms,
            queue=ran.queue_ms,
            inference=ran.inference_ms,
            total=milliseconds(seconds),
        ),
        "batch_size": ran.batch_size,
        "cached": ran.cached,
        "bank_digest": ran.bank_digest,
        "request_id": request_id,
    }


def summary(model: ServedModel) -> ModelSummary:
    """Describe a model in a list."""
    return ModelSummary(
        name=model.name,
        kind=model.kind,
        backbone=model.backbone.name,
        architecture=model.backbone.architecture,
        classes=len(model.class_names),
        dimensions=None if isinstance(model, ServedSegmenter) else model.backbone.dimensions,
        source_rate=model.source,
        max_rate=model.max_rate,
        bank=_bank(model.repaired),
        rates=[
            RateCost(
                rate=rate,
                tokens=cost.plan.tokens[-1],
                macs=cost.macs,
                macs_ratio=round(model.share(rate), 4),
            )
            for rate, cost in enumerate(model.costs)
        ],
        ladders=[_ladder(each) for each in model.ladders],
    )


def _ladder(model: ServedModel) -> LadderSummary:
    """Describe the ladder of a handle."""
    measured = _measured(model.evidence)
    return LadderSummary(
        name=model.ladder.name,
        digest=digest(model.ladder),
        method=model.ladder.method.name,
        options=options_of(model.ladder.method),
        max_rate=model.max_rate,
        source_rate=model.source,
        bank=_bank(model),
        rungs=[
            Rung(
                rate=rate,
                tokens=list(cost.plan.tokens),
                macs=cost.macs,
                share=model.share(rate),
                **measured.get(rate, {}),
            )
            for rate, cost in enumerate(model.costs)
        ],
        cascade=_cascade(model),
    )


def _cascade(model: ServedModel) -> list[CascadeSummary]:
    if model.cascade is None or misfit(model) is not None:
        return []
    return [
        CascadeSummary(rates=list(each.rates), agreement=each.agreement, share=each.share)
        for each in model.cascade.points
    ]


def _measured(evidence: Mapping[str, Any]) -> dict[int, dict[str, float]]:
    """Return the figures of each rung, as `tocom-train search` writes them; notes are free."""
    rows = evidence.get("rows")
    found: dict[int, dict[str, float]] = {}
    for row in rows if isinstance(rows, list | tuple) else ():
        if isinstance(row, dict) and type(rung := row.get("rung")) is int:
            found[rung] = {
                # Shares there, percent here, as in evaluations.
                name: value if name == "kl" else 100 * value
                for name in ("top1", "agreement", "kl")
                if isinstance(value := row.get(name), int | float) and math.isfinite(value)
            }
    return found


def detail(model: ServedModel) -> ModelDetail:
    """Describe a model by itself."""
    config, calibration = model.backbone.data_config, model.repaired.calibration
    palette = list(model.palette) if isinstance(model, ServedSegmenter) else None
    return ModelDetail(
        **summary(model).model_dump(),
        weights_digest=model.backbone.digest,
        class_names=list(model.class_names),
        multi_label=model.backbone.multi_label,
        input_size=model.input_size,
        crop=1.0 if palette else config["crop_pct"],
        crop_mode="none" if palette else config["crop_mode"],
        mean=list(config["mean"]),
        std=list(config["std"]),
        multiplier=calibration.multiplier if calibration else None,
        palette=palette,
        evaluation=model.evaluation,
        task=_task(model),
    )


def _task(model: ServedModel) -> TaskSummary | None:
    if (task := model.task) is None:
        return None
    return TaskSummary(
        name=task.name,
        digest=task.digest,
        method=task.method,
        backbone_digest=task.backbone.digest,
    )


def _merge_map(model: ServedModel, source: Tensor) -> MergeMap:
    """Describe where patches went, of source [N]: prefix tokens left out."""
    height, width = model.grid
    tokens = source[source.numel() - height * width :].tolist()
    return MergeMap(grid=(height, width), tokens=tokens, dropped=tokens.count(-1))


def _bank(model: ServedModel) -> BankSummary | None:
    if model.bank is None:
        return None
    return BankSummary(name=model.bank.info.name, digest=model.bank.info.digest)
