"""What `tocom-train attach` wrote of a calibration into a model's folder, as it is read again."""

from dataclasses import replace

import pytest

from adapters import Calibration
from tests.adapters.banks import backbone_of
from tests.adapters.test_task import random_task
from tests.tocom.test_backbones import rewrite, save, tiny_model
from tests.tocom_models import small_model
from tocom import BackboneError, load_backbone

CALIBRATION = {
    "bank_digest": "0123abcd",
    "source": 4,
    "multiplier": 0.12,
    "measure": "kl",
    "pictures": {"name": "p.tar", "count": 100},
}


@pytest.fixture
def folder(tmp_path):
    return save(tmp_path / "model", tiny_model())


def test_a_model_without_a_calibration_has_none(folder):
    assert Calibration.of(load_backbone(str(folder))) is None


def test_a_calibration_is_one_multiplier_or_one_for_each_target(folder):
    rewrite(folder, calibration=CALIBRATION)
    calibration = Calibration.of(load_backbone(str(folder)))
    assert (calibration.scale(0), calibration.scale(9)) == (0.12, 0.12)
    assert calibration.fits("0123abcd", 4)
    assert not calibration.fits("0123abcd", 0)
    assert not calibration.fits("4567", 4)

    rewrite(folder, calibration=CALIBRATION | {"multiplier": {"8": 0.2, "12": 1}})
    calibration = Calibration.of(load_backbone(str(folder)))
    assert [calibration.scale(rate) for rate in (8, 12, 9)] == [0.2, 1, None]


def test_a_task_has_its_own():
    backbone = replace(backbone_of(small_model()), calibration=CALIBRATION)
    assert Calibration.of(random_task(backbone).on(backbone)) is None
    task = random_task(backbone, calibration=CALIBRATION | {"source": 2})
    assert Calibration.of(task.on(backbone)).source == 2


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("bank_digest", 7),
        ("source", -1),
        ("source", True),
        ("multiplier", None),
        ("multiplier", 0),
        ("multiplier", -0.1),
        ("multiplier", "0.1"),
        ("multiplier", True),
        ("multiplier", float("nan")),
        ("multiplier", float("inf")),
        ("multiplier", {"8": 0}),
        ("multiplier", {"eight": 0.1}),
        ("multiplier", {"8": {"8": 0.1}}),
        ("measure", "loss"),
        ("pictures", "p.tar"),
    ],
)
def test_a_malformed_calibration_is_refused(folder, key, value):
    rewrite(folder, calibration=CALIBRATION | {key: value})
    with pytest.raises(BackboneError, match=rf"{folder}: calibration\.{key} must be .*, got "):
        Calibration.of(load_backbone(str(folder)))


def test_a_calibration_that_is_no_object_is_refused(folder):
    rewrite(folder, calibration=0.1)
    with pytest.raises(BackboneError, match=rf"{folder}: calibration must be an object, got 0\.1"):
        Calibration.of(load_backbone(str(folder)))
