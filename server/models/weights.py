"""What models of one server share: backbones, and deltas for a rate."""

import logging
import math
import threading
from weakref import WeakValueDictionary

from adapters import Bank, Calibration, compose
from server.models.graphs import Graphs
from tocom import AnyDelta, Backbone, BankError, FoldedWeights, fold, load_backbone
from tocom.delta import folded_bytes

logger = logging.getLogger(__name__)


class Deltas:
    """Deltas of one backbone: made on demand, there as long as somebody holds them.

    Folded while there is room for that; with a low-rank delta a forward takes a sixth to a half
    longer (docs/speed.md).
    """

    def __init__(self, backbone: Backbone, max_bytes: float = math.inf) -> None:
        """Hold nothing yet.

        Args:
            backbone: has the weights that deltas are added to.
            max_bytes: what folded weights may take, for each bank: one that takes the place of
                another must not find its room taken.
        """
        self._model = backbone.model
        self._max_bytes = max_bytes
        self._made: WeakValueDictionary[tuple[object, ...], AnyDelta] = WeakValueDictionary()
        self._lock = threading.Lock()

    def get(self, bank: Bank, source: int, rate: int, scale: float) -> AnyDelta:
        """Return Δ(source→rate), folded or low-rank.

        Args:
            bank: whose delta.
            source: rate that the model was tuned at.
            rate: rate that it will run at.
            scale: multiplier of the delta.

        Raises:
            BankError: if the bank's values are so large that the delta is not finite.
        """
        key = bank.info.digest, source, rate, scale
        with self._lock:
            made = self._made.get(key)
            if made is None:
                made = compose(bank, source, rate, scale)
                needed = folded_bytes(self._model, made)
                if self._folded_bytes(bank) + needed <= self._max_bytes:
                    made = fold(self._model, made)
                    finite = all(x.isfinite().all() for x in made.weights.values())
                else:
                    finite = all((x.up @ x.down).isfinite().all() for x in made.pairs.values())
                    made = made.to(next(self._model.parameters()).device)
                if not finite:
                    raise BankError(
                        f"bank {bank.info.name!r}: its delta {source}→{rate} at the multiplier "
                        f"{scale:g} holds NaN or infinity: its values must be smaller"
                    )
                self._made[key] = made
            return made

    def _folded_bytes(self, bank: Bank) -> int:
        """Return what weights take that have deltas of a bank folded in."""
        held = [delta for key, delta in self._made.items() if key[0] == bank.info.digest]
        return sum(delta.nbytes for delta in held if isinstance(delta, FoldedWeights))


class Backbones:
    """The backbones of one server, each loaded once, however many tasks there are on it.

    Attributes:
        graphs: compiled forwards of them.
    """

    def __init__(
        self,
        device: str = "cpu",
        graphs: Graphs | None = None,
        max_folded_bytes: float = math.inf,
    ) -> None:
        """Load nothing yet; `device` is where weights go, the rest as in `Deltas` and `Graphs`."""
        self._device = device
        self._max_folded_bytes = max_folded_bytes
        self.graphs = graphs or Graphs()
        self._loaded: dict[tuple[str, str | None], tuple[Backbone, Deltas]] = {}

    def get(self, name: str, architecture: str | None) -> tuple[Backbone, Deltas]:
        """Return a backbone and its deltas.

        Raises:
            BackboneError: if it cannot be loaded.
        """
        key = name, architecture
        if key not in self._loaded:
            backbone = load_backbone(name, architecture, self._device)
            self._loaded[key] = backbone, self.deltas(backbone)
        return self._loaded[key]

    def deltas(self, backbone: Backbone) -> Deltas:
        """Return the deltas of weights that no other model has; there are none yet."""
        return Deltas(backbone, self._max_folded_bytes)


def check_bank(bank: Bank, backbone: Backbone, source: int) -> None:
    """Check that a bank is for a backbone that was tuned at a rate; log what speaks against it.

    Raises:
        BankError: if it is for another one.
    """
    bank.check_geometry(backbone)
    bank.check_attention(backbone, source)
    # Not check_fits: warnings are the whole process's, and this may run while it serves.
    if (overridden := bank.overrides(backbone)) is not None:
        logger.warning("%s", overridden)
    if not bank.distilled_on(backbone):
        logger.info(
            "bank %s was distilled on other weights than %s has: right for a model tuned from that "
            "backbone, useless for another",
            bank.info.name, backbone.name,
        )  # fmt: skip


def calibration_of(
    name: str, backbone: Backbone, bank: Bank | None, source: int
) -> Calibration | None:
    """Return the model's calibration if it is one for how the model is served."""
    found = Calibration.of(backbone)
    if found is None or bank is None:
        return None
    if found.fits(bank.info.digest, source):
        return found
    logger.warning(
        "model %r: its calibration is ignored, the bank's own multiplier used: it is for the bank "
        "%s at source %d, served is the bank %s at source %d",
        name, found.bank_digest[:12], found.source, bank.info.digest[:12], source,
    )  # fmt: skip
    return None
