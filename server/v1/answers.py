"""From what models and engine say to the shapes that go over the wire."""

from collections import Counter
from typing import TYPE_CHECKING, Any

from torch import Tensor

from server.engine.job import Answer
from server.models.served import AutoWork, RateWork, ServedModel
from server.schemas import (
    BankSummary,
    Classification,
    MergeMap,
    ModelDetail,
    ModelStatus,
    ModelSummary,
    Prediction,
    RateCost,
    Status,
    TaskSummary,
    Timings,
    Tokens,
)

if TYPE_CHECKING:
    from server.inference.run import ClassifyQuery
    from server.web.serving import Serving


def classification(
    answer: Answer,
    query: "ClassifyQuery",
    top_k: int,
    total: float,
    request_id: str,
) -> Classification:
    """Describe the answer to one image.

    Args:
        answer: what the engine said.
        query: what was asked.
        top_k: predictions to list.
        total: seconds from the request to now.
        request_id: goes into the answer.
    """
    work = _work(answer)
    logits = answer.output.logits
    described = Classification(
        predictions=predictions(logits, work.model, top_k),
        **spent(answer, query.rate, total, request_id),
    )
    if query.logits:
        described.logits = logits.tolist()
    if query.merge_map:
        described.merge_map = _merge_map(work, answer.output.source)
    return described


def predictions(logits: Tensor, model: ServedModel, top_k: int) -> list[Prediction]:
    """Return the `top_k` most likely classes of logits [C], the most likely first."""
    scores, classes = logits.softmax(dim=-1).topk(top_k)
    names = model.backbone.class_names
    return [
        Prediction(index=index, label=names[index], score=score)
        for index, score in zip(classes.tolist(), scores.tolist(), strict=True)
    ]


def spent(answer: Answer, asked_rate: str, total: float, request_id: str) -> dict[str, Any]:
    """Return the fields of `Forward`: what ran for an image, why and what it cost."""
    work = _work(answer)
    model = work.model
    cost = model.costs[work.rate]
    return {
        "model": model.name,
        "asked_rate": asked_rate,
        "rate": work.rate,
        "reason": answer.reason,
        "source_rate": model.source,
        "compensate": work.compensate,
        "tokens": Tokens(
            input=cost.plan.tokens_in,
            blocks=list(cost.plan.tokens),
            final=cost.plan.tokens[-1],
        ),
        "macs": cost.macs,
        "macs_ratio": _ratio(model, work.rate),
        "timings_ms": Timings(
            decode=_ms(answer.decode),
            queue=_ms(answer.queue),
            inference=_ms(answer.inference),
            total=_ms(total),
        ),
        "batch_size": answer.batch_size,
        "bank_digest": _digest(model),
        "request_id": request_id,
    }


def notes(answer: Answer) -> dict[str, Any]:
    """Return what logs, headers and traces say of an answer."""
    work = _work(answer)
    return {
        "model": work.model.name,
        "rate": work.rate,
        "reason": answer.reason,
        "bank_digest": _digest(work.model),
        "batch_size": answer.batch_size,
        "decode_ms": _ms(answer.decode),
        "queue_ms": _ms(answer.queue),
        "inference_ms": _ms(answer.inference),
    }


def status(serving: "Serving") -> Status:
    """Describe what the server has to do just now."""
    load = serving.engine.load()
    queued: Counter[str] = Counter()
    for work, images in load.queued.items():
        assert isinstance(work, RateWork | AutoWork)
        queued[work.model.name] += images
    return Status(
        ready=serving.ready,
        uptime_s=round(serving.engine.clock() - serving.started, 1),
        images_per_second=round(serving.metrics.images_per_second(), 1),
        taken=load.taken,
        queued=queued.total(),
        max_queue=serving.engine.max_queue,
        models=[
            ModelStatus(
                name=model.name,
                queued=queued[model.name],
                auto_rate=model.controller.rate,
                bank_digest=_digest(model),
            )
            for model in serving.models.all()
        ],
    )


def summary(model: ServedModel) -> ModelSummary:
    """Describe a model in a list."""
    return ModelSummary(
        name=model.name,
        backbone=model.backbone.name,
        architecture=model.backbone.architecture,
        classes=len(model.backbone.class_names),
        source_rate=model.source,
        max_rate=model.max_rate,
        bank=_bank(model),
        rates=[
            RateCost(
                rate=rate,
                tokens=cost.plan.tokens[-1],
                macs=cost.macs,
                macs_ratio=_ratio(model, rate),
            )
            for rate, cost in enumerate(model.costs)
        ],
    )


def detail(model: ServedModel) -> ModelDetail:
    """Describe a model by itself."""
    config = model.backbone.data_config
    return ModelDetail(
        **summary(model).model_dump(),
        weights_digest=model.backbone.digest,
        class_names=list(model.backbone.class_names),
        input_size=model.input_size,
        crop=config["crop_pct"],
        crop_mode=config["crop_mode"],
        mean=list(config["mean"]),
        std=list(config["std"]),
        multiplier=model.calibration.multiplier if model.calibration else None,
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


def _work(answer: Answer) -> RateWork:
    """Return what ran: a model's work, since nothing else is submitted here."""
    assert isinstance(answer.work, RateWork)
    return answer.work


def _merge_map(work: RateWork, source: Tensor) -> MergeMap:
    """Describe which patches became one token, of source [N]: prefix tokens left out."""
    height, width = work.model.grid
    patches = source[source.numel() - height * width :]
    return MergeMap(grid=(height, width), tokens=patches.tolist())


def _bank(model: ServedModel) -> BankSummary | None:
    if model.bank is None:
        return None
    return BankSummary(name=model.bank.info.name, digest=model.bank.info.digest)


def _digest(model: ServedModel) -> str | None:
    return None if model.bank is None else model.bank.info.digest


def _ratio(model: ServedModel, rate: int) -> float:
    return round(model.costs[rate].macs / model.costs[0].macs, 4)


def _ms(seconds: float) -> float:
    return round(1000 * seconds, 3)
