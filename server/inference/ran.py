"""What ran for an image, why and what it cost: the one source of what answers and logs say."""

from dataclasses import dataclass, replace
from typing import Any

from server.engine.job import Answer
from server.models.segmenting import ServedSegmenter
from server.models.served import RateWork, ServedModel
from tocom import Cost


@dataclass(frozen=True)
class Ran:
    """See the module.

    Attributes:
        model: that ran.
        rate: that it ran at; of several the last one, whose answer it is.
        rates: all that it ran at, one after the other.
        compensate: whether a delta was applied.
        reason: why at that rate.
        cost: of the image at `rate`.
        macs: multiply-adds of all its runs.
        macs_ratio: the same, compared to rate 0.
        bank_digest: of the model's bank; None without one.
        batch_size: images that ran together, at `rate`; 0 if it was kept from before.
        cached: whether it was.
        decode_ms, queue_ms, inference_ms: what the image waited for, in milliseconds.
    """

    model: ServedModel
    rate: int
    rates: tuple[int, ...]
    compensate: bool
    reason: str
    cost: Cost
    macs: int
    macs_ratio: float
    bank_digest: str | None
    batch_size: int
    cached: bool
    decode_ms: float
    queue_ms: float
    inference_ms: float

    @classmethod
    def of(cls, answer: Answer) -> "Ran":
        """Describe what the engine says of an image."""
        work = answer.work
        assert isinstance(work, RateWork)  # nothing else is submitted here
        rates = tuple(each.work.rate for each in (*answer.before, answer))
        return cls(
            model=work.model,
            rate=work.rate,
            rates=rates,
            compensate=work.compensate,
            reason=answer.reason,
            cost=work.model.costs[work.rate],
            macs=sum(work.model.costs[rate].macs for rate in rates),
            macs_ratio=round(sum(map(work.model.share, rates)), 4),
            bank_digest=work.model.bank_digest,
            batch_size=answer.batch_size,
            cached=answer.cached,
            decode_ms=milliseconds(answer.decode),
            queue_ms=milliseconds(answer.queue),
            inference_ms=milliseconds(answer.inference),
        )

    @classmethod
    def of_scene(cls, answer: Answer) -> "Ran":
        """Describe the same of a picture that was segmented, at the cost of its own size."""
        ran, scores = cls.of(answer), answer.output
        assert isinstance(ran.model, ServedSegmenter)
        down, across = ran.model.backbone.model.patch_embed.patch_size
        size = scores.shape[1] * down, scores.shape[2] * across
        own, stock = (ran.model.cost_of(rate, size) for rate in (ran.rate, 0))
        return replace(ran, cost=own, macs=own.macs, macs_ratio=round(own.macs / stock.macs, 4))

    @property
    def notes(self) -> dict[str, Any]:
        """What logs, headers, metrics and traces say of it."""
        notes = {
            "model": self.model.name,
            "ladder": self.model.ladder.name,
            "rate": self.rate,
            **({"rates": "+".join(map(str, self.rates))} if len(self.rates) > 1 else {}),
            "reason": self.reason,
            "bank_digest": self.bank_digest,
            "batch_size": self.batch_size,
            "decode_ms": self.decode_ms,
            "queue_ms": self.queue_ms,
            "inference_ms": self.inference_ms,
        }
        return notes | ({"cached": True} if self.cached else {})


def milliseconds(seconds: float) -> float:
    """Return seconds as answers tell them."""
    return round(1000 * seconds, 3)
