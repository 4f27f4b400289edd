"""Models without a server: does all load and run, and what does a photograph show?"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from server.errors import ImageError
from server.inference.query import AUTO, CASCADE
from server.inference.run import model_of, top_k
from server.models.loading import load_models
from server.models.pictures import prepare
from server.models.registry import Registry
from server.models.served import RateWork, ServedModel
from server.schemas import Prediction
from server.settings import Settings
from server.v1 import answers
from tocom import FoldedWeights, RateError


@dataclass(frozen=True)
class Checked:
    """A model that loads and runs.

    Attributes:
        model: the model.
        weights: bytes of its weights.
        folded: bytes of the weights with a delta folded in, once every rate was asked for.
    """

    model: ServedModel
    weights: int
    folded: int


def check(settings: Settings) -> Iterator[Checked]:
    """Load all models and run each at the lowest and the highest rate of its ladders.

    Raises:
        TocomError: if one cannot be loaded.
    """
    for model in load_models(settings):
        for each in model.ladders:
            for rate in (0, each.max_rate):
                with torch.inference_mode():
                    each.at(rate, compensate=True)(torch.zeros(1, *model.input_size))
        tensors = [*model.backbone.model.parameters(), *model.backbone.model.buffers()]
        folded = 0
        if (repaired := model.repaired).bank is not None:
            rates = [rate for rate in range(repaired.max_rate + 1) if rate != repaired.source]
            deltas = [repaired.delta(rate) for rate in rates]
            folded = sum(delta.nbytes for delta in deltas if isinstance(delta, FoldedWeights))
        yield Checked(model, sum(tensor.nbytes for tensor in tensors), folded)


class Classifier:
    """The first model of some settings that classifies, at one rate, in this process."""

    def __init__(self, settings: Settings, rate: str, predictions: int | None) -> None:
        """Load the model.

        Args:
            settings: say which; of the models after it nothing is loaded.
            rate: an exact one; there is no load here that `auto` could go by.
            predictions: how many; default: as the settings say.

        Raises:
            TocomError: if it or one before it cannot be loaded, it does not run at the rate, or
                none classifies.
        """
        self._settings = settings
        for each in settings.models:
            models = load_models(settings.model_copy(update={"models": (each,)}))
            if models[0].kind == "classification":
                break
        self.model = model_of("classification", None, Registry(models))
        if rate in (AUTO, CASCADE):
            raise RateError(
                f"rate {rate} needs a server; here it is a whole number from "
                f"0 to {self.model.max_rate}"
            )
        self.work = self.model.at(self.model.parse_rate(rate), compensate=True)
        self._top_k = top_k(predictions, self.model, settings)

    def classify(self, photo: Path) -> list[Prediction]:
        """Return what a photograph shows, the most likely first.

        Raises:
            TocomError: if it cannot be read.
        """
        try:
            data = photo.read_bytes()
        except OSError as error:
            raise ImageError(f"it cannot be read: {error.strerror}") from error
        image = prepare(data, self.model, self._settings)
        return answers.predictions(_run(self.work, image), self.model, self._top_k)


def _run(work: RateWork, image: torch.Tensor) -> torch.Tensor:
    """Return the logits [C] of an image [3, H, W]."""
    with torch.inference_mode():
        (output,) = work(image[None])
    logits: torch.Tensor = output.logits
    return logits
