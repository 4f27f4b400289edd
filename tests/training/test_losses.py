import pytest
import torch

from tests.tocom_models import pictures, small_model
from tocom import Variant
from tocom.vit import Outputs, State, embed, outputs
from training.losses import kd_loss, token_error


def test_loss_is_zero_only_for_equal_logits() -> None:
    logits = torch.randn(4, 7)
    assert kd_loss(logits, logits).item() == pytest.approx(0, abs=1e-6)
    assert kd_loss(logits + 3, logits).item() == pytest.approx(0, abs=1e-6)
    assert kd_loss(torch.zeros(4, 7), logits).item() > 0.01


def slow_token_error(student: Outputs, teacher: Outputs) -> float:
    """The same, token by token."""
    blocks = []
    for mine, theirs in zip(student.states, teacher.states, strict=True):
        coarse, fine = (mine, theirs) if mine.x.shape[1] <= theirs.x.shape[1] else (theirs, mine)
        assert coarse.source is not None
        assert fine.source is not None
        errors = []
        for image in range(len(coarse.x)):
            for token in range(coarse.x.shape[1]):
                inputs = (coarse.source[image] == token).nonzero()[:, 0]
                mean = torch.stack([fine.x[image, fine.source[image, i]] for i in inputs]).mean(0)
                errors.append((coarse.x[image, token] - mean).square().mean())
        blocks.append((torch.stack(errors).mean() / theirs.x.var()).item())
    return sum(blocks) / len(blocks)


def traced(kind: str, rate: int) -> Outputs:
    model = small_model(kind)
    return outputs(model, embed(model, pictures(model)), Variant(rate), trace=True)


@pytest.mark.parametrize("kind", ["vit_tiny", "global_pool"])
@pytest.mark.parametrize(("source", "target"), [(0, 3), (3, 0), (1, 4), (4, 1)])
def test_tokens_are_compared_where_both_have_merged(kind: str, source: int, target: int) -> None:
    teacher, student = traced(kind, source), traced(kind, target)
    found = token_error(student.states, teacher.states)
    assert found.item() == pytest.approx(slow_token_error(student, teacher), rel=1e-4)
    assert found.item() > 1e-4


def test_equal_tokens_have_no_error_and_states_leave_out_the_last_block() -> None:
    one = traced("vit_tiny", 2)
    assert token_error(one.states, one.states).item() == pytest.approx(0, abs=1e-12)
    assert len(one.states) == len(small_model().blocks) - 1
    assert all(isinstance(state, State) for state in one.states)
