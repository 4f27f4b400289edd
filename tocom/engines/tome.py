"""ToMe as operations of OpenVINO: as `reduction.tome` and `merging`, for tokens of known counts.

Letters: B images, N tokens in, r tokens merged away, H heads, d their width.
"""

from typing import Any, NamedTuple

import numpy as np
from openvino import opset15 as ops

from tocom.reduction import ToMe

#: The end of a slice that goes up to the last element.
_END = np.array([np.iinfo(np.int32).max], np.int32)


class Seen(NamedTuple):
    """What the attention of a block saw."""

    keys: Any  # [B, N, d] the mean of the keys over the heads
    q: Any  # [B, H, N, d]
    k: Any  # [B, H, N, d]
    log: Any  # [B, 1, 1, N] log sizes; None: all count alike
    scale: float


def merge(
    method: ToMe, x: Any, size: Any, seen: Seen, removed: int, prefix: int, metric: Any = None
) -> tuple[Any, Any]:
    """Return tokens and sizes after a match and a merge; only tokens of set B can change.

    Args:
        method: the options.
        x: [B, N, D] tokens.
        size: [B, N, 1] input tokens that each stands for; None: one each.
        seen: by the attention of the block.
        removed: tokens to merge away, more than 0.
        prefix: tokens at the front that never merge.
        metric: [B, N, C] what is compared; None: as the options say.
    """

    def a(x: Any) -> Any:
        """Return the tokens of set A, those at even positions, without prefix tokens."""
        return ops.slice(x, [prefix + prefix % 2], _END, [2], [1])

    def b(x: Any) -> Any:
        """Return the tokens of set B, those at odd positions, without prefix tokens."""
        return ops.slice(x, [prefix + 1 - prefix % 2], _END, [2], [1])

    attention = _class_attention(seen) if method.needs_class else None
    penalty = _penalty(method, attention, size)
    if metric is None:
        metric = x if method.metric == "tokens" else seen.keys
    length = ops.maximum(ops.reduce_l2(metric, [2], True), np.float32(1e-12))
    metric = ops.divide(metric, length)
    scores = ops.matmul(a(metric), b(metric), False, True)
    if penalty is not None:
        scores = ops.subtract(scores, a(penalty))
        scores = ops.subtract(scores, ops.transpose(b(penalty), [0, 2, 1]))
    top = ops.topk(scores, 1, -1, "max", "none")
    best, partner = top.outputs()  # [B, A, 1]
    order = ops.topk(best, best.shape[1], 1, "max", "value").output(1)
    chosen = ops.slice(order, [0], [removed], [1], [1])
    rest = ops.slice(order, [removed], _END, [1], [1])
    if prefix:  # in their order; without a prefix as they are, as `match` has it
        rest = ops.topk(rest, rest.shape[1], 1, "min", "value").output(0)
    if size is None:
        size = ops.constant(np.ones((*x.shape[:2], 1), np.float32))
    into = ops.gather_elements(partner, chosen, 1)  # [B, r, 1]

    def joined(counts: Any) -> Any:
        """Return what set B has of counts [B, N, 1] when the chosen of A have joined it."""
        moved = ops.gather_elements(a(counts), chosen, 1)
        return ops.scatter_elements_update(b(counts), into, moved, 1, "sum")

    size_b = joined(size)
    weight = attention if method.weight == "class" else size
    moved = ops.multiply(_rows(a(x), chosen), ops.gather_elements(a(weight), chosen, 1))
    x_b = ops.multiply(b(x), b(weight))
    x_b = ops.scatter_elements_update(x_b, ops.broadcast(into, moved.shape), moved, 1, "sum")
    whole = size_b if weight is size else joined(weight)
    tokens = [_rows(a(x), rest), ops.divide(x_b, whole)]
    sizes = [ops.gather_elements(a(size), rest, 1), size_b]
    if prefix:
        tokens.insert(0, ops.slice(x, [0], [prefix], [1], [1]))
        sizes.insert(0, ops.slice(size, [0], [prefix], [1], [1]))
    return ops.concat(tokens, 1), ops.concat(sizes, 1)


def _class_attention(seen: Seen) -> Any:
    """Return the attention of the class token [B, N, 1], mean over the heads, times N."""
    first = ops.slice(seen.q, [0], [1], [1], [2])  # [B, H, 1, d]
    first = ops.multiply(first, np.float32(seen.scale))
    scores = ops.matmul(first, seen.k, False, True)
    scores = scores if seen.log is None else ops.add(scores, seen.log)
    share = ops.reduce_mean(ops.softmax(scores, -1), [1], False)  # [B, 1, N]
    share = ops.multiply(share, np.float32(share.shape[2]))
    return ops.transpose(ops.maximum(share, np.float32(1e-12)), [0, 2, 1])


def _penalty(method: ToMe, attention: Any, size: Any) -> Any:
    """Return what `ToMe` takes off similarities for each token [B, N, 1]; None: nothing."""
    penalty = None
    if method.importance:
        penalty = ops.multiply(ops.log(attention), np.float32(method.importance))
    if method.size and size is not None:
        sizes = ops.multiply(ops.log(size), np.float32(method.size))
        penalty = sizes if penalty is None else ops.add(penalty, sizes)
    return penalty


def _rows(x: Any, index: Any) -> Any:
    """Return the tokens of x [B, N, D] at index [B, r, 1]."""
    return ops.gather(x, ops.squeeze(index, [2]), 1, 1)
