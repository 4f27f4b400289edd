"""What `tocom-train attach` wrote into a model's folder, as it is read again."""

import pytest

from tests.tocom.test_backbones import rewrite, save, tiny_model
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


def test_a_model_without_notes_has_no_calibration_and_no_evaluation(folder):
    backbone = load_backbone(str(folder))
    assert backbone.calibration is None
    assert backbone.evaluation is None


def test_a_calibration_is_one_multiplier_or_one_for_each_target(folder):
    rewrite(folder, calibration=CALIBRATION, evaluation={"rows": []})
    backbone = load_backbone(str(folder))
    assert (backbone.calibration.scale(0), backbone.calibration.scale(9)) == (0.12, 0.12)
    assert backbone.calibration.fits("0123abcd", 4)
    assert not backbone.calibration.fits("0123abcd", 0)
    assert not backbone.calibration.fits("4567", 4)
    assert backbone.evaluation == {"rows": []}

    rewrite(folder, calibration=CALIBRATION | {"multiplier": {"8": 0.2, "12": 1}})
    calibration = load_backbone(str(folder)).calibration
    assert [calibration.scale(rate) for rate in (8, 12, 9)] == [0.2, 1, None]


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
    with pytest.raises(BackboneError, match=rf"calibration\.{key} must be .*, got "):
        load_backbone(str(folder))


def test_a_calibration_that_is_no_object_is_refused(folder):
    rewrite(folder, calibration=0.1)
    with pytest.raises(BackboneError, match=r"calibration must be an object, got 0\.1"):
        load_backbone(str(folder))
