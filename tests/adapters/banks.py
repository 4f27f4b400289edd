"""Small banks with random plug-ins."""

import torch
from timm.models.vision_transformer import VisionTransformer

from adapters import BackboneInfo, Bank, BankInfo, Geometry
from adapters.bank import ladder_entries, tensor_shapes
from tocom import TOME, Backbone, Ladder
from tocom.reduction import ToMe

ALL_TARGETS = ("q", "k", "v", "proj", "fc1", "fc2")
GEOMETRY = Geometry(depth=2, width=4, heads=2, hidden=6, input=(8, 8), patch=(4, 4))


#: Three rungs above the stock model, for the two blocks and four patches of `GEOMETRY`.
RUNGS = Ladder("uneven", ToMe(), ((0, 0), (0, 1), (1, 1), (2, 1)), 4)


def backbone_of(model: VisionTransformer, name: str = "small") -> Backbone:
    return Backbone(model=model, name=name, architecture="small_vit", class_names=())


def random_bank(
    backbone: BackboneInfo | None = None,
    targets: tuple[str, ...] = ("q", "v"),
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    name: str = "tiny",
    ladder: Ladder = TOME,
) -> Bank:
    """Make a bank of three steps of rank 2 for `backbone`, or for one that nobody has."""
    info = BankInfo(
        **ladder_entries(ladder),
        name=name,
        backbone=backbone or BackboneInfo(architecture="none", geometry=GEOMETRY, digest="0" * 64),
        max_rate=3,
        rank=2,
        targets=targets,
        scale=0.5,
        training={"samples": 12, "recipe": {"lr": 1e-3}},
    )
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        key: torch.randn(shape, generator=generator).to(dtype)
        for key, shape in tensor_shapes(info).items()
    }
    return Bank(info, tensors)


def same(one: Bank, other: Bank) -> bool:
    """Whether two banks say and hold the same, bit for bit, notes aside."""
    notes = {"training", "evaluation"}
    return one.info.model_dump(exclude=notes) == other.info.model_dump(exclude=notes) and all(
        torch.equal(one.tensors[name], other.tensors[name]) for name in one.tensors
    )
