"""The studies: what is made of measurements is right."""

import timm
import torch
from PIL import Image

from benchmarks.studies import reduction
from tests.tocom_models import small_model
from tocom import Backbone
from tocom.reduction import DiffRate, ToMe


def test_a_study_of_methods_compares_them_picture_by_picture():
    first, second = ToMe(), ToMe(importance=0.05)
    found = {(first, rate): [(0.1, 1.0), (0.3, 0.0)] for rate in reduction.RATES}
    found |= {(second, rate): [(0.0, 1.0), (0.1, 1.0)] for rate in reduction.RATES}
    head, _, *rows = reduction.table(Backbone(small_model(), "small", "small", ()), found).split(
        "\n"
    )
    assert head.startswith("| method | r = 8: GMACs | KL | agreement |")
    assert rows[0].startswith("| tome | 0.0")
    assert "| 0.2000 | 50.0 % |" in rows[0]
    assert rows[1].startswith("| tome, importance 0.05 | 0.0")
    assert "| 0.0500 ± 0.0500 | 100.0 % |" in rows[1]


def test_a_study_of_methods_asks_each_of_the_same_pictures(tmp_path):
    (tmp_path / "a").mkdir()
    for number in range(3):
        Image.new("RGB", (64, 64), (80 * number, 9, 9)).save(tmp_path / "a" / f"{number}.png")
    model = timm.create_model("vit_tiny_patch16_224", depth=2, num_classes=10).eval()
    backbone = Backbone(model, "small", "small", ())
    with torch.inference_mode():
        found = reduction.measure(backbone, str(tmp_path), 2, 0, [ToMe(), DiffRate()])
    assert [*found] == [(method, rate) for method in (ToMe(), DiffRate()) for rate in (8, 16)]
    assert {len(rows) for rows in found.values()} == {2}
