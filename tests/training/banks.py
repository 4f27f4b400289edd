"""Banks that repair nothing, for models that know nothing."""

import torch

from adapters import BackboneInfo, Bank, BankInfo
from adapters.bank import tensor_shapes
from tocom import Backbone


def random_bank(backbone: Backbone, scale: float = 1.0) -> Bank:
    info = BankInfo(
        name="random", backbone=BackboneInfo.of(backbone), max_rate=4, rank=2,
        targets=("q", "v"), scale=scale,
    )  # fmt: skip
    torch.manual_seed(1)
    tensors = {name: 0.2 * torch.randn(shape) for name, shape in tensor_shapes(info).items()}
    return Bank(info, tensors)
