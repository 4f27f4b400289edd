"""Which channels go: the least in score, all heads of a block alike.

A pure function of scores. Queries and keys lose the same channels, for each meets the other in one
product; and when a head loses a channel, every other head of its block loses its own least.

Letters: L blocks, H heads, d channels of a head, M channels of an MLP.
Reference: CAIT, consistent dynamic channel pruning, Algorithms 1 (heads) and 2 (attention). That no
head and no MLP loses its last channel is ours.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Scores(NamedTuple):
    """How much each channel matters."""

    q: Tensor  # [L, H, d]
    k: Tensor  # [L, H, d]
    v: Tensor  # [L, H, d]
    fc1: Tensor  # [L, M]


class Kept(NamedTuple):
    """Which channels stay; heads of a block have equally many."""

    qk: Tensor  # [L, H, d]
    v: Tensor  # [L, H, d]
    fc1: Tensor  # [L, M]


class Freed(NamedTuple):
    """Multiply-adds that one channel of a block takes along, per image."""

    qk: list[int]  # [L] a channel of the queries and its channel of the keys, of one head
    v: list[int]  # [L] a channel of the values, of one head
    fc1: list[int]  # [L]


class Selection(NamedTuple):
    """What goes."""

    kept: Kept
    order: list[tuple[int, int, int, int]]  # block, 0 qk 1 v 2 fc1, head, channel; as they go
    freed: int  # multiply-adds


def select(scores: Scores, freed: Freed, wanted: float) -> Selection:
    """Take channels away, the least in score first, until so many multiply-adds are freed.

    Of equals the first goes: queries and keys before values before MLPs, then by block, head and
    channel. What is wanted may be more than all that can go.

    Args:
        scores: of all channels.
        freed: by each of them.
        wanted: multiply-adds to free, at least.
    """
    # In one list: (kind, block, head) has a row of channels; an MLP is one head.
    together = ((scores.q + scores.k) / 2, scores.v, scores.fc1.unsqueeze(1))
    rows = [scores.tolist() for scores in together]
    values = torch.cat([scores.flatten() for scores in together])
    shapes = [scores.shape for scores in together]
    places = [
        (kind, block, head, channel)
        for kind, (blocks, heads, channels) in enumerate(shapes)
        for block in range(blocks)
        for head in range(heads)
        for channel in range(channels)
    ]
    # The channels of each head that are left, the least last.
    left = {
        (kind, block, head): sorted(range(len(row)), key=lambda i: (row[i], i), reverse=True)
        for kind, blocks in enumerate(rows)
        for block, heads in enumerate(blocks)
        for head, row in enumerate(heads)
    }
    gone: set[tuple[int, int, int, int]] = set()
    order: list[tuple[int, int, int, int]] = []
    total = 0
    for at in values.argsort(stable=True).tolist():
        if total >= wanted:
            break
        kind, block, first, channel = places[at]
        if (kind, block, first, channel) in gone or len(left[kind, block, first]) == 1:
            continue
        # The least of all that are left is the least of its head, too.
        for head in range(shapes[kind][1]):
            least = left[kind, block, head].pop()
            gone.add((kind, block, head, least))
            order.append((block, kind, head, least))
            total += freed[kind][block]
    kept = [torch.ones(shape, dtype=torch.bool) for shape in shapes]
    for kind, block, head, channel in gone:
        kept[kind][block, head, channel] = False
    return Selection(Kept(kept[0], kept[1], kept[2].squeeze(1)), order, total)
