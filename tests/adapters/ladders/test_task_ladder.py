"""Tasks that were tuned on a ladder of their own, and the banks that go with them."""

import json
from pathlib import Path
from typing import Any

import pytest

from adapters import BackboneInfo, TaskModel
from adapters.ladder import LadderPart
from tests.adapters.banks import backbone_of, random_bank
from tests.adapters.test_task import random_task
from tests.tocom_models import small_model
from tocom import TOME, BankError, Ladder, TaskError
from tocom.reduction import ToMe

UNEVEN = Ladder("uneven", ToMe(), ((0, 0, 0), (0, 2, 1), (1, 3, 2), (4, 3, 2)), 16)
PART = LadderPart.describe(UNEVEN)
BACKBONE = backbone_of(small_model())


def test_a_task_says_the_ladder_that_it_was_tuned_on(tmp_path: Path) -> None:
    task = random_task(BACKBONE, ladder=PART)
    loaded = TaskModel.load(task.save(tmp_path / "task"))
    assert loaded.info == task.info
    assert (loaded.ladder, loaded.on(BACKBONE).ladder) == (UNEVEN, UNEVEN)
    plain = random_task(BACKBONE)
    assert (plain.ladder, plain.on(BACKBONE).ladder) == (TOME, TOME)
    assert plain.info.digest != task.info.digest
    assert "ladder" not in json.loads((plain.save(tmp_path / "plain") / "task.json").read_text())


def test_the_name_of_a_ladder_is_no_part_of_a_tasks_digest() -> None:
    renamed = random_task(BACKBONE, ladder=PART.model_copy(update={"name": "renamed"}))
    assert renamed.info.digest == random_task(BACKBONE, ladder=PART).info.digest


@pytest.mark.parametrize(
    ("changes", "ladder", "message"),
    [
        ({"source": 4}, {}, r"source must be a rung of the ladder 'uneven', in 0\.\.3, got 4"),
        ({}, {"rungs": [[0, 0], [1, 1], [1, 1]]}, "is for 2 blocks, the backbone has 3"),
        ({}, {"rungs": None, "patches": 0}, "is the paper's"),
        ({}, {"method": {"name": "magic"}}, "there is no method 'magic'"),
        ({}, {"patches": 9}, "does not match its digest"),
    ],
)
def test_a_faulty_ladder_of_a_task_is_refused(
    changes: dict[str, Any], ladder: dict[str, Any], message: str, tmp_path: Path
) -> None:
    file = random_task(BACKBONE, ladder=PART).save(tmp_path / "task") / "task.json"
    said = json.loads(file.read_text())
    file.write_text(json.dumps(said | changes | {"ladder": said["ladder"] | ladder}))
    with pytest.raises(TaskError, match=message):
        TaskModel.load(tmp_path / "task")


def test_a_bank_for_another_ladder_is_refused_but_from_rung_0() -> None:
    info = BackboneInfo.of(BACKBONE)
    own, papers = random_bank(info, ladder=UNEVEN), random_bank(info)
    tuned = random_task(BACKBONE, ladder=PART).on(BACKBONE)
    own.check_fits(tuned)
    message = "bank 'tiny' is for the ladder 'tome': colours was tuned at rate 2 of .* 'uneven'"
    with pytest.raises(BankError, match=message):
        papers.check_fits(tuned)
    papers.check_fits(tuned, source=0)
    papers.check_fits(random_task(BACKBONE, ladder=PART, source=0).on(BACKBONE))
    with pytest.raises(BankError, match="is for the ladder 'uneven': colours was tuned at rate 2"):
        own.check_fits(random_task(BACKBONE).on(BACKBONE))
    own.check_fits(BACKBONE, source=2)  # it was tuned on none


def test_a_task_is_not_for_a_model_that_cannot_run_its_ladder(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    task = random_task(BACKBONE, ladder=PART)
    monkeypatch.setattr(ToMe, "refuse", lambda method, model: "the method wants another model")
    with pytest.raises(TaskError, match="'colours' does not fit small: the method wants another"):
        task.on(BACKBONE)
