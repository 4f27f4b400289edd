"""Banks on a ladder around the MLP learn from all tokens, those of the last block too."""

from pathlib import Path

import pytest
import torch

from tests.tocom_models import pictures as noise
from tests.tocom_models import small_model
from tocom import Ladder, Variant, forward_dense, load_backbone
from tocom.reduction import AroundMLP
from tocom.vit import embed, outputs
from training.config import DistillConfig
from training.distill import Distillation
from training.losses import kd_loss, token_error


def test_all_tokens_of_the_last_block_are_there_if_they_are_asked_for() -> None:
    model = small_model()
    ladder = Ladder("around", AroundMLP(), ((0, 0, 0), (3, 0, 7)), patches=16)
    images, variant = noise(model), Variant(1, ladder=ladder)
    few = outputs(model, embed(model, images), variant, trace=True)
    whole = outputs(model, embed(model, images), variant, trace=True, whole=True)
    assert [len(each.states) for each in (few, whole)] == [2, 3]
    torch.testing.assert_close(whole.logits, few.logits, rtol=1e-5, atol=1e-4)
    features = model.norm(whole.states[-1].x)[:, 1:].transpose(1, 2).unflatten(2, (4, 4))
    assert torch.equal(features, forward_dense(model, images, 1, ladder=ladder))


@pytest.mark.parametrize("ladder", ["around-mlp", "tome"])
def test_the_loss_is_over_all_blocks_on_a_ladder_around_the_mlp(
    ladder: str, pictures: Path, model_folder: Path
) -> None:
    backbone = load_backbone(str(model_folder))
    config = DistillConfig.model_validate(
        {
            "name": "dense",
            "backbone": {"name": str(model_folder)},
            "pictures": str(pictures),
            "ladder": ladder,
            "max_rate": 4,
            "tokens": 3.0,
            "loop": {"steps": 1, "batch_size": 2, "learning_rate": 1e-3},
        }
    )
    job = Distillation(backbone, config, [])
    images = torch.rand(2, 3, 32, 32)
    source, (target,) = job._rates(0)[0]
    (loss,) = job.losses(images, torch.zeros(2, dtype=torch.long), 0)
    tokens = embed(backbone.model, images)
    student, teacher = (
        outputs(
            backbone.model,
            tokens,
            Variant(rate, ladder=job.ladder),
            trace=True,
            whole=ladder == "around-mlp",
        )
        for rate in (target, source)
    )
    assert len(student.states) == (2 if ladder == "around-mlp" else 1)
    expected = kd_loss(student.logits, teacher.logits)
    expected = expected + 3 * token_error(student.states, teacher.states)
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
