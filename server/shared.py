"""What models of one server share: backbones, and weights that are folded for a rate."""

import threading
from weakref import WeakValueDictionary

from adapters import Bank, compose
from server.graphs import Graphs
from tocom import Backbone, FoldedWeights, fold, load_backbone


class Folds:
    """Folded weights of one backbone: made on demand, there as long as somebody holds them."""

    def __init__(self, backbone: Backbone) -> None:
        """Hold nothing yet; `backbone` has the weights that deltas are added to."""
        self._model = backbone.model
        self._made: WeakValueDictionary[tuple[object, ...], FoldedWeights] = WeakValueDictionary()
        self._lock = threading.Lock()

    def get(self, bank: Bank, source: int, rate: int, scale: float | None) -> FoldedWeights:
        """Return the weights with Δ(source→rate) folded in.

        Args:
            bank: whose delta.
            source: rate that the model was tuned at.
            rate: rate that it will run at.
            scale: multiplier in place of the bank's own.
        """
        key = bank.info.digest, source, rate, scale
        with self._lock:
            folded = self._made.get(key)
            if folded is None:
                folded = fold(self._model, compose(bank, source, rate, scale))
                self._made[key] = folded
            return folded


class Backbones:
    """The backbones of one server, each loaded once, however many tasks there are on it.

    Attributes:
        graphs: compiled forwards of them.
    """

    def __init__(self, device: str = "cpu", graphs: Graphs | None = None) -> None:
        """Load nothing yet; `device` is where weights go."""
        self._device = device
        self.graphs = graphs or Graphs()
        self._loaded: dict[tuple[str, str | None], tuple[Backbone, Folds]] = {}

    def get(self, name: str, architecture: str | None) -> tuple[Backbone, Folds]:
        """Return a backbone and what is folded of it.

        Raises:
            BackboneError: if it cannot be loaded.
        """
        key = name, architecture
        if key not in self._loaded:
            backbone = load_backbone(name, architecture, self._device)
            self._loaded[key] = backbone, Folds(backbone)
        return self._loaded[key]
