"""Reading the golden cases: numbers of the reference implementations, see oracle/README.md."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from tocom import Ladder, Rate, Variant
from tocom.reduction import Method
from tocom.vit import State, run_blocks

FOLDER = Path(__file__).parent / "oracle"


def read(name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the description and the tensors of a case."""
    with safe_open(FOLDER / f"{name}.safetensors", "pt") as file:
        metadata = file.metadata()
        case = json.loads(metadata.get("case") or metadata["params"])
        return case, {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def build(case: dict[str, Any], tensors: dict[str, Tensor]) -> VisionTransformer:
    """Build the timm model of a case."""
    classes = {"VisionTransformerDistilled": VisionTransformerDistilled}
    model = classes.get(case.get("cls", ""), VisionTransformer)(**case["kwargs"])
    prefix = "weights."
    weights = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    model.load_state_dict(weights)
    return model.eval().requires_grad_(False)


def rates(case: dict[str, Any]) -> list[Rate]:
    """Return the rates of a model case; JSON has no tuple, so `[r, t, "inflect"]` stands for it."""
    return [
        (rate[0], rate[1]) if isinstance(rate, list) and rate[-1] == "inflect" else rate
        for rate in case["rates"]
    ]


def run_block(
    case: dict[str, Any], tensors: dict[str, Tensor], method: Method, amount: int
) -> State:
    """Run the block of a case with one prefix token, whose method is asked for `amount`."""
    x = tensors["x"]
    width, patches = x.shape[2], x.shape[1] - 1
    model = VisionTransformer(
        embed_dim=width, depth=1, num_heads=case["heads"], num_classes=0
    ).eval()
    prefix = "w."
    weights = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    model.blocks[0].load_state_dict(weights)
    ladder = Ladder("golden", method, ((0,), (amount,)), patches)
    with torch.no_grad():
        return next(run_blocks(model, x, Variant(1, ladder=ladder), trace=True))
