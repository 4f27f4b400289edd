"""What a method of reduction has learned: a plain value that goes into the forward call.

A method is a value without tensors, and a model is never changed. So the weights of a method that
is learned travel beside both, as an adapter's branches do.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from tocom.errors import ReductionError
from tocom.reduction.protocol import Method


def weights_of(
    learned: "ReductionWeights | None", method: Method, block: int
) -> Mapping[str, Tensor]:
    """Return what a method has learned for a block, by name.

    Raises:
        ReductionError: if there is nothing, or another method learned it.
    """
    if learned is None:
        how = (
            "distil a bank that learns them (tocom-train distill), and use it"
            if method.in_bank
            else "tune one on a ladder of this method (tocom-train finetune), and use what comes "
            "of it"
        )
        raise ReductionError(
            f"the method {method.name!r} runs with weights that are learned, and the model has "
            f"none: {how}"
        )
    return learned.of(method, block)


@dataclass(frozen=True, eq=False)
class ReductionWeights:
    """The weights of a learned method for one model; equal to itself only.

    Attributes:
        method: that learned them.
        tensors: those of each block at which it may act, such as `3.queries`, of the block 3.
    """

    method: Method
    tensors: Mapping[str, Tensor]

    @cached_property
    def _blocks(self) -> dict[int, dict[str, Tensor]]:
        blocks: dict[int, dict[str, Tensor]] = {}
        for name, tensor in self.tensors.items():
            block, _, part = name.partition(".")
            blocks.setdefault(int(block), {})[part] = tensor
        return blocks

    def of(self, method: Method, block: int) -> Mapping[str, Tensor]:
        """Return what the method has learned for a block, by name.

        Raises:
            ReductionError: if another method learned it, or nothing was learned for the block.
        """
        if method != self.method:
            raise ReductionError(
                f"the learned weights are of the method {self.method}, and the ladder's is {method}"
            )
        if block not in self._blocks:
            raise ReductionError(
                f"the method {method.name!r} has learned nothing for block {block}, only for "
                f"{', '.join(map(str, sorted(self._blocks)))}: a learned method runs on the "
                "ladder that it was tuned on"
            )
        return self._blocks[block]
