"""Tasks that were tuned with a learned method hold its weights, and are read strictly."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from adapters import TaskModel
from adapters.ladder import LadderPart
from tests.adapters.banks import backbone_of
from tests.adapters.test_task import random_task
from tests.tocom_models import pictures, small_model
from tocom import TOME, Ladder, TaskError, forward
from tocom.reduction import ATME, DPCKNN, DynamicViT, PatchMerger, Sinkhorn, SiT

METHODS = [DynamicViT(), SiT(), PatchMerger(), Sinkhorn(), DPCKNN(weighted=True), ATME(linear=True)]


def tuned_with(method: Any, kind: str = "adaptformer") -> TaskModel:
    rungs = ((0, 0, 1), (1, 0, 1)) if method.name == "atme" else ((0, 9, 0), (0, 6, 4))
    ladder = Ladder("learned", method, ((0, 0, 0), *rungs), 16)
    said = LadderPart.describe(ladder).model_dump(mode="json")
    return random_task(backbone_of(small_model()), kind, ladder=said)


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_a_task_runs_at_every_rung_with_what_was_saved(method: Any, tmp_path: Path) -> None:
    task = tuned_with(method)
    loaded = TaskModel.load(task.save(tmp_path / "task"))
    backbone = backbone_of(small_model())
    images = pictures(backbone.model)
    one, other = task.on(backbone), loaded.on(backbone)
    assert other.ladder.method == method
    for rung in range(3):
        answers = [
            forward(m.model, images, rung, adapter=m.adapter, ladder=m.ladder, learned=m.learned)
            for m in (one, other)
        ]
        assert torch.equal(*answers)
        assert answers[0].isfinite().all()
    assert one.digest != backbone.digest


def test_weights_are_of_those_blocks_that_act_and_count_in_the_digest() -> None:
    task = tuned_with(SiT(), "linear")
    shapes = {
        name.removeprefix("reduction."): tuple(tensor.shape)
        for name, tensor in task.tensors.items()
        if name.startswith("reduction.")
    }
    assert {name.partition(".")[0] for name in shapes} == {"1", "2"}
    assert shapes["1.weight.3.weight"] == (9, 96)  # for the rung that leaves the most
    changed = task.tensors | {"reduction.1.scale": 2 * task.tensors["reduction.1.scale"]}
    again = TaskModel(task.info.model_copy(update={"digest": ""}), changed)
    assert again.info.digest != task.info.digest
    with pytest.raises(TaskError, match="does not match its digest"):
        TaskModel(task.info, changed)


def test_a_task_on_a_ladder_that_learns_nothing_is_what_it_was(tmp_path: Path) -> None:
    backbone = backbone_of(small_model())
    task = random_task(backbone)
    assert task.ladder == TOME
    assert not any(name.startswith("reduction.") for name in task.tensors)
    assert task.on(backbone).learned is None
    said = json.loads((task.save(tmp_path / "task") / "task.json").read_text())
    assert "ladder" not in said


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reduction.1.v": None}, "lacks tensor reduction.1.v"),
        ({"reduction.0.v": torch.zeros(9, 192)}, "has an unknown tensor reduction.0.v"),
        (
            {"reduction.1.v": torch.zeros(8, 192)},
            r"reduction.1.v must be \[9, 192\], got \[8, 192\]",
        ),
        ({"reduction.2.v": torch.full((4, 192), torch.nan)}, "reduction.2.v holds NaN or infin"),
        ({"reduction.2.v": torch.zeros(4, 192).half()}, "must be all fp32 or all fp16"),
    ],
)
def test_what_is_not_its_weights_is_refused(
    change: dict[str, torch.Tensor | None], message: str
) -> None:
    task = tuned_with(Sinkhorn())
    tensors = {k: v for k, v in (task.tensors | change).items() if v is not None}
    with pytest.raises(TaskError, match=message):
        TaskModel(task.info, tensors)
