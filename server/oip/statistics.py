"""What the statistics of the Open Inference Protocol count: its requests for inference.

Not for several threads: the event loop owns it. Begins anew with each process.
"""

import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from server.engine.job import Answer
from server.oip.schemas import BatchStatistics, Duration, InferenceStatistics, ModelStatistics


@dataclass
class _Counts:
    """Of one model. The counters go by the size of the batch."""

    stats: InferenceStatistics = field(default_factory=InferenceStatistics)
    last: float = 0.0
    images: Counter[int] = field(default_factory=Counter)
    decode: Counter[int] = field(default_factory=Counter)
    inference: Counter[int] = field(default_factory=Counter)


class Statistics:
    """Counts of all models, by their names."""

    def __init__(self, wall_clock: Callable[[], float] = time.time) -> None:
        self._wall_clock = wall_clock
        self._models: dict[str, _Counts] = {}

    def succeeded(
        self, model: str, answers: Sequence[Answer], seconds: float, output: float
    ) -> None:
        """Count a request that is answered.

        Args:
            model: that ran.
            answers: to its images.
            seconds: from its arrival on.
            output: of these, those that went into writing the answer.
        """
        counts = self._models.setdefault(model, _Counts())
        counts.last = self._wall_clock()
        stats = counts.stats
        stats.success.add(seconds)
        stats.queue.add(max(answer.queue for answer in answers))
        stats.compute_input.add(max(answer.decode for answer in answers))
        stats.compute_infer.add(max(answer.inference for answer in answers))
        stats.compute_output.add(output)
        for answer in answers:
            size = answer.batch_size
            counts.images[size] += 1
            counts.decode[size] += round(1e9 * answer.decode)
            counts.inference[size] += round(1e9 * answer.inference)

    def failed(self, model: str, seconds: float) -> None:
        """Count a request that is not."""
        self._models.setdefault(model, _Counts()).stats.fail.add(seconds)

    def of(self, model: str) -> ModelStatistics:
        """Return what a model has done so far.

        The images of a batch may belong to several requests, also to those of other
        interfaces. So each image stands for its share of a batch, and sums are rounded up.
        """
        counts = self._models.get(model, _Counts())
        batches = [_batches(counts, size) for size in sorted(counts.images)]
        return ModelStatistics(
            name=model,
            last_inference=round(1000 * counts.last),
            inference_count=counts.images.total(),
            execution_count=sum(each.compute_infer.count for each in batches),
            inference_stats=counts.stats,
            batch_stats=batches,
        )


def _batches(counts: _Counts, size: int) -> BatchStatistics:
    count = math.ceil(counts.images[size] / size)
    return BatchStatistics(
        batch_size=size,
        compute_input=Duration(count=count, ns=counts.decode[size]),
        compute_infer=Duration(count=count, ns=counts.inference[size] // size),
        compute_output=Duration(),  # is of requests, not of batches
    )
