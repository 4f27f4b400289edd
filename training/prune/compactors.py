"""Compactors: square layers behind those that are pruned, which learn which channels can go.

y = (x W) C. C starts as the identity, behind the queries, keys and values and the first layer of
the MLP of each block. A channel of C that is to go learns from the lasso alone, not from the
pictures. At the end C is folded into W, without the channels that go, and the layers that read
these lose their rows.

Heads lose different channels, so the mean of their keys, by which ToMe merges, is another then.

Letters: L blocks, H heads, d channels of a head, M channels of an MLP.
Reference: CAIT's compactors in the form of ResRep, arXiv:2007.03260, section 3.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from tocom.pruned import Channels, narrow
from training.prune.selection import Kept, Scores

Score = Literal["norm", "gradient"]
#: Share of what was noted of gradients before that is kept at each of them.
_REMEMBERED = 0.95


class Compacted(nn.Linear):
    """A linear layer and its compactors, one for each of its parts.

    Attributes:
        compactors: [n, n] of each part; together they have the layer's outputs.
        kept: [out] the channels that do not go.
        felt: [out] running mean of the squared gradient on the diagonal of the compactors: how
            much the loss feels a channel. It is not noted of channels that go.
        masked: whether channels that go count nothing already.
    """

    kept: Tensor
    felt: Tensor

    def __init__(self, layer: nn.Linear, parts: int, masked: bool) -> None:
        """Take over the weights of `layer`, whose outputs are so many parts, equally wide."""
        nn.Module.__init__(self)  # nn.Linear's own would draw weights
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.weight, self.bias = layer.weight, layer.bias
        width = layer.out_features // parts
        eye = torch.eye(width, device=layer.weight.device)
        self.compactors = nn.ParameterList(nn.Parameter(eye.clone()) for _ in range(parts))
        self.masked = masked
        self.register_buffer(
            "kept", torch.ones(layer.out_features, dtype=torch.bool).to(eye.device)
        )
        self.register_buffer("felt", eye.new_zeros(layer.out_features))

    def forward(self, x: Tensor) -> Tensor:
        """Return (x W + b) C, in one product."""
        return F.linear(x, *self.folded())

    def folded(self) -> tuple[Tensor, Tensor | None]:
        """Return the weight [out, in] and the bias [out] with the compactors in them."""
        compactors = [self._compactor(i) for i in range(len(self.compactors))]
        width = self.out_features // len(compactors)
        weights = zip(compactors, torch.split(self.weight, width), strict=True)
        weight = torch.cat([compactor.t() @ part for compactor, part in weights])
        if self.bias is None:
            return weight, None
        biases = zip(compactors, torch.split(self.bias, width), strict=True)
        return weight, torch.cat([part @ compactor for compactor, part in biases])

    def _compactor(self, part: int) -> Tensor:
        own = self.compactors[part]
        kept = self.kept.view(len(self.compactors), -1)[part]
        compactor = own * kept if self.masked else torch.where(kept, own, own.detach())
        if compactor.requires_grad:
            compactor.register_hook(partial(self._feel, part))
        return compactor

    def _feel(self, part: int, gradient: Tensor) -> None:
        shape = len(self.compactors), -1
        kept, felt = self.kept.view(*shape)[part], self.felt.view(*shape)[part]
        now = _REMEMBERED * felt + (1 - _REMEMBERED) * gradient.detach().diagonal().float() ** 2
        felt.copy_(torch.where(kept, now, felt))

    @property
    def lasso(self) -> Tensor:
        """The sum of the norms of all channels of the compactors."""
        return torch.stack([each.norm(dim=0).sum() for each in self.compactors]).sum()

    def scores(self, by: Score) -> list[Tensor]:
        """Return how much each channel [n] of each part matters.

        Args:
            by: `norm` of its column of the compactor; `gradient`: how much the loss feels it.
        """
        if by == "gradient":
            return list(self.felt.view(len(self.compactors), -1))
        return [each.detach().norm(dim=0) for each in self.compactors]


def compact(model: VisionTransformer, masked: bool) -> None:
    """Put compactors, which change nothing yet, into every block of a model, in place."""
    for block in model.blocks:
        block.attn.qkv = Compacted(block.attn.qkv, 3, masked)
        block.mlp.fc1 = Compacted(block.mlp.fc1, 1, masked)


def compacted(model: VisionTransformer) -> Iterator[Compacted]:
    """Yield the layers that have compactors: of each block first the attention's."""
    for block in model.blocks:
        yield from (block.attn.qkv, block.mlp.fc1)


def lasso(model: VisionTransformer) -> Tensor:
    """Return the sum of the norms of all channels of all compactors."""
    return torch.stack([layer.lasso for layer in compacted(model)]).sum()


def scores_of(model: VisionTransformer, by: Score) -> Scores:
    """Return how much each channel of a model matters, on the CPU."""
    blocks: list[Any] = list(model.blocks)
    heads = blocks[0].attn.num_heads
    attention = zip(*(block.attn.qkv.scores(by) for block in blocks), strict=True)
    fc1 = [block.mlp.fc1.scores(by)[0] for block in blocks]
    q, k, v = (_heads(each, heads) for each in attention)
    return Scores(q, k, v, torch.stack(fc1).cpu())


def choose(model: VisionTransformer, kept: Kept) -> None:
    """Tell the compactors which channels stay."""
    for block, qk, v, fc1 in zip(model.blocks, *kept, strict=True):
        block.attn.qkv.kept.copy_(torch.cat([qk, qk, v]).flatten())
        block.mlp.fc1.kept.copy_(fc1)


@torch.no_grad()
def fold(model: VisionTransformer) -> None:
    """Make a model with compactors a smaller one without, in place."""
    layers = []
    qks, vs, hiddens = [], [], []
    for block in model.blocks:
        attention, mlp = block.attn, block.mlp
        kept, hidden = attention.qkv.kept, mlp.fc1.kept
        values = kept.chunk(3)[2]
        qks.append(int(kept.chunk(3)[0].sum()) // attention.num_heads)
        vs.append(int(values.sum()) // attention.num_heads)
        hiddens.append(int(hidden.sum()))
        qkv, fc1 = attention.qkv.folded(), mlp.fc1.folded()
        layers.append(
            {
                "attn.qkv.weight": qkv[0][kept],
                "attn.qkv.bias": None if qkv[1] is None else qkv[1][kept],
                "attn.proj.weight": attention.proj.weight[:, values],
                "attn.proj.bias": attention.proj.bias,
                "mlp.fc1.weight": fc1[0][hidden],
                "mlp.fc1.bias": None if fc1[1] is None else fc1[1][hidden],
                "mlp.fc2.weight": mlp.fc2.weight[:, hidden],
                "mlp.fc2.bias": mlp.fc2.bias,
            }
        )
    narrow(model, Channels(tuple(qks), tuple(vs), tuple(hiddens)))
    for block, weights in zip(model.blocks, layers, strict=True):
        found = {name: weight for name, weight in weights.items() if weight is not None}
        block.load_state_dict(block.state_dict() | found)


def _heads(parts: Sequence[Tensor], heads: int) -> Tensor:
    """Return [L, H, d] of channels [H d] of each block, on the CPU."""
    joined = torch.stack(list(parts)).cpu()
    return joined.view(len(joined), heads, -1)
