"""One variant of a model's forward, as one value that is passed down whole.

A model has one set of weights and many variants: at each rate, with each delta, for each task.
"""

from dataclasses import dataclass
from functools import partial

from timm.models.vision_transformer import VisionTransformer

from tocom.adapter import Adapter
from tocom.delta import AnyDelta
from tocom.ladder import TOME, Ladder, Plan
from tocom.reduction import Cut, ReductionWeights
from tocom.reduction.weights import weights_of
from tocom.schedule import Rate


@dataclass(frozen=True, eq=False)
class Variant:
    """What decides an answer beside the model and its images; equal to itself only.

    Attributes:
        rate: a rung of the ladder; 0 is the stock model. On the paper's also `(r, inflection)`
            or a list, as in `schedule`.
        delta: the change of weights to run with, low-rank or folded. It is not checked here,
            where every batch passes: `check_delta` does it once.
        adapter: branches that the model was tuned with.
        proportional: merged tokens count in attention by their size. Off for MAE models that
            run untuned and for models that were trained with merging but without it.
        ladder: what the rate means.
        learned: weights of the ladder's method, if it is one that learns. On a ladder of another
            method they are of no effect.
    """

    rate: Rate = 0
    delta: AnyDelta | None = None
    adapter: Adapter | None = None
    proportional: bool = True
    ladder: Ladder = TOME
    learned: ReductionWeights | None = None

    def plan(
        self, model: VisionTransformer, tokens: int, grid: tuple[int, int] | None = None
    ) -> Plan:
        """Return the token counts of a forward of `tokens` tokens, prefix tokens included.

        Args:
            model: a supported timm ViT.
            tokens: that enter the first block.
            grid: rows and columns of patches; None: the model's own, if they are as many.

        Raises:
            RateError: if the ladder has no such rung, or the rate is malformed.
            ReductionError: if the ladder is for another number of blocks.
        """
        prefix = model.num_prefix_tokens
        if grid is None:
            rows, columns = model.patch_embed.grid_size
            # A model that takes pictures of any size does not say how these were cut.
            grid = (rows, columns) if rows * columns == tokens - prefix else None
        return self.ladder.plan(self.rate, len(model.blocks), tokens, prefix, grid)

    def cuts(self, plan: Plan, trace: bool = False) -> tuple[Cut | None, ...]:
        """Return what each block is to do by a plan of this variant; None: nothing.

        Raises:
            ReductionError: if the method needs weights for a block that acts, and has none.
        """
        method = self.ladder.method
        learned = partial(weights_of, self.learned, method) if method.learns else None
        return plan.cuts(trace, learned)
