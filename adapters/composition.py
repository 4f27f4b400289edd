"""Compose a bank into the delta for any pair of rates.

One low-rank step per unit of rate: going up adds, going down subtracts. Trains nothing,
touches no model.

Reference: ToCom section 3.2: Δ(m→n) = Σ P_{i→i+1} for i in m..n-1, Δ(n→m) = -Δ(m→n).
"""

from collections.abc import Mapping

from torch import Tensor

from adapters.bank import Bank
from tocom import Delta, LowRank, RateError


def compose(bank: Bank, source: int, target: int, scale: float | None = None) -> Delta:
    """Return the delta that lets a model tuned at `source` run at `target`.

    Args:
        bank: R steps of rank k.
        source: rate that the model was tuned at, in [0, R].
        target: rate that it will run at, in [0, R].
        scale: multiplier to use in place of the bank's own, such as one searched for the model.

    Returns:
        Low-rank pairs of width |target - source| k, scale and sign included; fp32 also for a
        bank stored in fp16. Without pairs if source and target are equal.

    Raises:
        RateError: naming the allowed range.
    """
    tensors = {name: tensor.float() for name, tensor in bank.tensors.items()}
    return compose_steps(tensors, bank.info.scale if scale is None else scale, source, target)


def compose_steps(
    tensors: Mapping[str, Tensor], scale: float, source: int, target: int, dropout: float = 0.0
) -> Delta:
    """Compose from a bank's tensors directly; differentiable, for training.

    Args:
        tensors: `{layer}.A` [R, k, in] and `{layer}.B` [R, out, k]; others are of no effect.
        scale: multiplier s.
        source, target: rates in [0, R].
        dropout: on the hidden values, whatever mode the model is in.

    Raises:
        RateError: naming the allowed range.
    """
    max_rate = next(each.shape[0] for name, each in tensors.items() if name.endswith(".A"))
    for what, rate in (("source", source), ("target", target)):
        if isinstance(rate, bool) or not isinstance(rate, int) or not 0 <= rate <= max_rate:
            raise RateError(f"the bank's {what} rate must be in 0..{max_rate}, got {rate!r}")
    if source == target:
        return Delta({})
    low, high = sorted((source, target))
    # The sign goes into B alone: in both factors it would cancel.
    factor = scale if target > source else -scale
    pairs = {}
    for name, down in tensors.items():
        layer, _, leaf = name.rpartition(".")
        if leaf != "A":
            continue
        up = tensors[f"{layer}.B"][low:high]  # [n, out, k]
        pairs[layer] = LowRank(
            down=down[low:high].flatten(0, 1),  # [n k, in]
            up=factor * up.transpose(0, 1).flatten(1),  # [out, n k]
        )
    return Delta(pairs, dropout)
