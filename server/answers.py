"""From what models and engine say to the shapes that go over the wire."""

from server.engine import Answer
from server.models import RateWork, ServedModel
from server.schemas import (
    BankSummary,
    Classification,
    ModelDetail,
    ModelSummary,
    Prediction,
    RateCost,
    Timings,
    Tokens,
)


def classification(
    work: RateWork, answer: Answer, top_k: int, logits: bool, total: float, request_id: str
) -> Classification:
    """Describe the answer to one image.

    Args:
        work: what ran.
        answer: what came out.
        top_k: predictions to list.
        logits: whether to list all logits too.
        total: seconds from the request to now.
        request_id: goes into the answer.
    """
    model = work.model
    cost = model.costs[work.rate]
    scores, classes = answer.logits.softmax(dim=-1).topk(top_k)
    described = Classification(
        model=model.name,
        predictions=[
            Prediction(index=index, label=model.backbone.class_names[index], score=score)
            for index, score in zip(classes.tolist(), scores.tolist(), strict=True)
        ],
        rate=work.rate,
        source_rate=model.source,
        compensate=work.compensate,
        tokens=Tokens(
            input=cost.plan.tokens_in,
            blocks=list(cost.plan.tokens),
            final=cost.plan.tokens[-1],
        ),
        macs=cost.macs,
        macs_ratio=_ratio(model, work.rate),
        timings_ms=Timings(
            decode=_ms(answer.decode),
            queue=_ms(answer.queue),
            inference=_ms(answer.inference),
            total=_ms(total),
        ),
        batch_size=answer.batch_size,
        bank_digest=None if model.bank is None else model.bank.info.digest,
        request_id=request_id,
    )
    if logits:
        described.logits = answer.logits.tolist()
    return described


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
        mean=list(config["mean"]),
        std=list(config["std"]),
        multiplier=model.calibration.multiplier if model.calibration else None,
        evaluation=model.evaluation,
    )


def _bank(model: ServedModel) -> BankSummary | None:
    if model.bank is None:
        return None
    return BankSummary(name=model.bank.info.name, digest=model.bank.info.digest)


def _ratio(model: ServedModel, rate: int) -> float:
    return round(model.costs[rate].macs / model.costs[0].macs, 4)


def _ms(seconds: float) -> float:
    return round(1000 * seconds, 3)
