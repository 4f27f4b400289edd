"""Compiled graphs: made of the forwards that are worth it, used where they are faster.

A forward runs eagerly at first. Once that takes longer than compiling does, a thread compiles
a graph beside the service; where batches run, it is tried and kept if it is faster. A graph is for
one rate of a ladder and one number of images: a batch is cut into pieces of those numbers. Who
waits for an answer meanwhile should not notice: one graph is made at a time, with pauses, and
tried in single runs between batches. Which methods have graphs is the engine's matter.
"""

import logging
import math
import threading
import time
import weakref
from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from typing import Any, NamedTuple, TypeAlias

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from server.engine.threads import Team
from server.engine.times import Flow
from server.errors import UnavailableError
from tocom import TOME, Delta, FoldedWeights, Ladder, Variant
from tocom.allocator import return_freed_memory
from tocom.vit import Outputs, embed, outputs

logger = logging.getLogger(__name__)

#: Images that graphs are made for, the largest first. More at once are hardly faster an image.
SIZES = (16, 8, 4, 1)
#: Seconds that a forward runs eagerly before it is worth a graph, which takes a second to make and
#: 100 MB as long as it is there.
WORTH = 2.0
#: Over how many seconds that is counted: what runs rarely would be worth one some day, too.
WINDOW = 300.0
#: Seconds after which a graph that did not run may have to give way to another.
IDLE = 30.0
#: The pause after a graph was made, in times of what that took.
PAUSE = 20.0
#: How often a graph, and what it is for, run when it is tried.
TRIES = 3

#: Runs something where batches run, between two of them.
Call: TypeAlias = Callable[[Callable[[], Any]], Future[Any]]
#: Is told that a model became faster or slower at a rate of a ladder; returns what measures it
#: again.
Changed: TypeAlias = Callable[[VisionTransformer, Ladder, int], Sequence[Callable[[], None]]]


class Forward(NamedTuple):
    """What is run, but for the images."""

    model: VisionTransformer
    variant: Variant

    def __call__(self, images: Tensor) -> Outputs:
        """Run images [B, 3, H, W], from any device, eagerly."""
        device = self.model.patch_embed.proj.weight.device
        return outputs(self.model, embed(self.model, images.to(device)), self.variant)

    @property
    def name(self) -> str:
        """How the log calls it."""
        ladder = self.variant.ladder
        return f"rate {self.variant.rate}" + ("" if ladder == TOME else f" of {ladder.name}")

    @property
    def is_folded(self) -> bool:
        """Whether a graph can run it: deltas are none of a graph's own business."""
        return not isinstance(self.variant.delta, Delta)

    @property
    def owner(self) -> Hashable:
        """What tells its weights, and what it reads, from others at its rate; holds nothing."""
        delta, beside = self.variant.delta, (self.variant.adapter, self.variant.learned)
        folded = weakref.ref(delta) if isinstance(delta, FoldedWeights) else None
        return folded, *map(id, beside)


#: Measures with a module that makes graphs what the linear layers of a forward read.
Measure: TypeAlias = Callable[[Any, Forward], Mapping[str, tuple[float, float]]]


@dataclass(eq=False)
class _Cell:
    """What is known of the forwards that share a graph."""

    of: tuple[VisionTransformer, Ladder, int]  # what a graph makes faster
    spent: Flow = field(default_factory=Flow)  # seconds that they ran eagerly
    used: float = 0.0  # when the graph ran last
    graph: Callable[..., Outputs] | None = None
    eager: bool = False  # it has no graph, or that is not faster


class Graphs:
    """See the module. Until `start`, and without OpenVINO, everything runs eagerly.

    All but `start` and `stop` is to be called where batches run.
    """

    def __init__(
        self,
        limit: int = 0,
        clock: Callable[[], float] = time.monotonic,
        dtype: torch.dtype = torch.float32,
        threads: int = 1,
        measure: Measure | None = None,
    ) -> None:
        """Keep at most `limit` graphs, which compute in `dtype`; all forwards on `threads`.

        With `measure` their linear layers are in int8, and each is for the weights of one delta.
        """
        self.team = Team(threads)
        self._limit = limit
        self._dtype = dtype
        self._measure = measure
        self._clock = clock
        self._cells: dict[tuple[object, ...], _Cell] = {}
        self._engine: Any = None  # the module that makes graphs
        self._pause = 0.0  # when the next graph may be made
        self._making: threading.Thread | None = None

    def start(self, call: Call, changed: Changed) -> None:
        """Begin to make graphs.

        Args:
            call: runs something where batches run, between two of them.
            changed: is called there when a graph is taken, and then what it returns. Also when a
                graph is lost; then the next batches tell how long they take.
        """
        if not self._limit:
            return
        try:
            self._engine = import_module("tocom.engines.openvino")
        except ImportError:
            logger.info("forwards are not compiled: pip install 'tocom-serve[openvino]'")
            return
        self._call, self._changed = call, changed

    def stop(self) -> None:
        """Wait for the graph that is being made; to be called when no more batches run.

        A process that ends while OpenVINO compiles is aborted.
        """
        if self._making is not None:
            self._making.join()

    def run(self, forward: Forward, images: Tensor) -> Outputs:
        """Run any number of images [B, 3, H, W], by graphs where there are some."""
        done, rest = [], images
        for size in SIZES:
            cell = self._cell(forward, size)
            while len(rest) >= size and cell.graph is not None and forward.is_folded:
                cell.used = self._clock()
                try:
                    done.append(cell.graph(rest[:size], forward.variant))
                except Exception:
                    logger.exception("%s runs eagerly: its graph failed", forward.name)
                    cell.eager = True
                    self._lose(cell)
                    break
                rest = rest[size:]
            if len(rest) >= size:
                began = self._clock()
                done.append(self._eagerly(forward, rest))
                now = self._clock()
                cell.spent.add(now - began, now, WINDOW)
                if forward.is_folded and self._is_worth_it(cell):
                    self._make(forward, size, cell)
                break
        return _joined(done)

    def _cell(self, forward: Forward, size: int) -> _Cell:
        model, variant = forward
        weights: Hashable = variant.adapter and variant.adapter.bottleneck
        if self._measure is not None:
            weights = forward.owner
        key = model, variant.ladder, variant.rate, variant.proportional, weights, size
        if key not in self._cells:
            for other in [*filter(_is_over, self._cells)]:
                self._lose(self._cells.pop(other))
            assert isinstance(variant.rate, int)  # as that of all that is served
            self._cells[key] = _Cell((model, variant.ladder, variant.rate))
        return self._cells[key]

    def _is_worth_it(self, cell: _Cell) -> bool:
        """Return whether a graph is to be made; another may have given way to it then."""
        now = self._clock()
        if self._engine is None or cell.eager or now < self._pause:
            return False
        if cell.spent.total(now, WINDOW) < WORTH:
            return False
        taken = [cell for cell in self._cells.values() if cell.graph is not None]
        if len(taken) < self._limit:
            return True
        idle = [cell for cell in taken if now - cell.used > IDLE]
        if not idle:
            return False
        oldest = min(idle, key=lambda cell: cell.used)
        oldest.spent = Flow()
        self._lose(oldest)
        return True

    def _lose(self, cell: _Cell) -> None:
        """Run eagerly from now on what a graph may have run."""
        if cell.graph is not None:
            cell.graph = None
            self._changed(*cell.of)

    def _make(self, forward: Forward, size: int, cell: _Cell) -> None:
        self._pause = math.inf  # until it is made
        arguments = self._engine, forward, size, cell
        # Where batches run is a daemon, which threads that it starts would be, too.
        self._making = threading.Thread(
            target=self._compile, args=arguments, name="compile", daemon=False
        )
        self._making.start()

    def _compile(self, engine: Any, forward: Forward, size: int, cell: _Cell) -> None:
        """Compile a graph, beside the service, and take it if it is faster."""
        began = self._clock()
        try:
            self._try_out(engine, forward, size, cell)
        except Exception:  # whatever it is, the service goes on without the graph
            logger.exception("%s runs eagerly: its graph cannot be had", forward.name)
            cell.eager = True
        finally:
            # What compiling took, and a graph that gave way or is not wanted.
            return_freed_memory()
            self._pause = self._clock() + PAUSE * (self._clock() - began)

    def _try_out(self, engine: Any, forward: Forward, size: int, cell: _Cell) -> None:
        reason = engine.unsupported(forward.model, forward.variant.ladder.method)
        if reason is not None:
            logger.info("%s runs eagerly: %s", forward.name, reason)
            cell.eager = True
            return
        arguments = [*forward, size, self.team.threads, self._dtype]
        if self._measure is not None:
            arguments.append(self._measure(engine, forward))
        graph = engine.Graph(*arguments)
        with suppress(UnavailableError):  # the server ends
            compiled, eager = self._compare(forward, size, graph)
            take = partial(self._take, forward, size, cell, graph, compiled, eager)
            for measure in self._call(take).result():
                self._call(measure).result()

    def _compare(
        self, forward: Forward, size: int, graph: Callable[..., Outputs]
    ) -> tuple[float, float]:
        """Return the least seconds that a graph takes, and that it takes eagerly.

        In turns: what the machine is busy with meanwhile meets both.
        """

        def compiled(images: Tensor) -> Outputs:
            return graph(images, forward.variant)

        eager = partial(self._eagerly, forward)
        tries = [
            [
                self._call(partial(self._try, forward, size, run)).result()
                for run in (compiled, eager)
            ]
            for _ in range(TRIES)
        ]
        return min(took for took, _ in tries), min(took for _, took in tries)

    def _try(self, forward: Forward, size: int, run: Callable[[Tensor], Outputs]) -> float:
        """Return how long a run takes."""
        images = torch.zeros(size, *_input_size(forward.model))
        began = self._clock()
        with torch.inference_mode():
            run(images)
        return self._clock() - began

    def _eagerly(self, forward: Forward, images: Tensor) -> Outputs:
        return _joined(self.team.run(forward.__call__, images))

    def _take(
        self,
        forward: Forward,
        size: int,
        cell: _Cell,
        graph: Callable[..., Outputs],
        compiled: float,
        eager: float,
    ) -> Sequence[Callable[[], None]]:
        """Take a graph if it is faster; return what measures again what became so."""
        cell.eager = compiled >= eager
        logger.info(
            "%s, %d images: %.1f ms compiled, %.1f ms eagerly: %s",
            forward.name, size, 1000 * compiled, 1000 * eager,
            "stays eager" if cell.eager else "compiled from now on",
        )  # fmt: skip
        if cell.eager:
            return ()
        cell.graph, cell.used = graph, self._clock()
        return self._changed(*cell.of)


def _joined(parts: Sequence[Outputs]) -> Outputs:
    features, logits = zip(*((each.features, each.logits) for each in parts), strict=True)
    return Outputs(torch.cat(features), torch.cat(logits))


def _input_size(model: VisionTransformer) -> tuple[int, int, int]:
    embedding = model.patch_embed
    height, width = embedding.img_size
    return embedding.proj.in_channels, height, width


def _is_over(key: tuple[object, ...]) -> bool:
    """Return whether the bank that a graph was for is served no more."""
    match key:
        case (*_, (weakref.ref() as delta, *_), _):
            return delta() is None
    return False
