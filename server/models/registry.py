"""The models that are served, by name, while they may be replaced."""

import threading
from collections.abc import Callable, Iterable

from timm.models.vision_transformer import VisionTransformer

from server.errors import UnknownModelError
from server.models.served import ServedModel
from tocom import Ladder


class Registry:
    """Handles of the served models; the first one is the default.

    Which names there are is settled at the start; which handle a name stands for may change.
    Any thread may ask and replace: a reader gets the old handle or the new one, whole.
    """

    def __init__(self, models: Iterable[ServedModel]) -> None:
        """Take over the models, whose names must differ."""
        models = tuple(models)
        self._models = {model.name: model for model in models}
        assert models
        assert len(self._models) == len(models)
        self._lock = threading.Lock()

    def get(self, name: str | None) -> ServedModel:
        """Return the handle that a name stands for now; the default model's for None.

        Raises:
            UnknownModelError: naming those that there are.
        """
        with self._lock:
            if name is None:
                return next(iter(self._models.values()))
            if name not in self._models:
                raise UnknownModelError(
                    f"no model is called {name[:100]!r}; there are: {', '.join(self._models)}"
                )
            return self._models[name]

    def all(self) -> tuple[ServedModel, ...]:
        """Return the handles that are served now, the default one first."""
        with self._lock:
            return tuple(self._models.values())

    def measure_again(
        self, network: VisionTransformer, ladder: Ladder, rate: int
    ) -> list[Callable[[], None]]:
        """Forget how long a network takes at a rate of a ladder, for all models that have it.

        Returns:
            What takes note of how long it takes now; all is to be called where batches run.
        """
        return [
            measure
            for model in self.all()
            for each in model.ladders
            if each.backbone.model is network and each.ladder == ladder
            for measure in each.measure_again(rate)
        ]

    def replace(self, model: ServedModel) -> None:
        """Let a handle take the place of the one of its name; the old one is let go.

        Raises:
            UnknownModelError: if no model has the name.
        """
        self.get(model.name)
        with self._lock:
            self._models[model.name] = model
