import json
from pathlib import Path

import pytest
import torch

from adapters import Bank, BankBackbone, BankInfo, compose
from adapters.bank import tensor_shapes
from tocom import Backbone, DataError, forward, load_backbone
from training.config import EvaluateConfig, PicturesConfig
from training.data import evaluation_batches
from training.evaluate import class_indices, evaluate


def random_bank(backbone: Backbone) -> Bank:
    info = BankInfo(
        name="random", backbone=BankBackbone.of(backbone), max_rate=4, rank=2,
        targets=("q", "v"), scale=1.0,
    )  # fmt: skip
    torch.manual_seed(1)
    return Bank(
        info, {name: torch.randn(shape) * 0.2 for name, shape in tensor_shapes(info).items()}
    )


def test_figures_are_those_of_single_forwards(
    pictures: Path, model_folder: Path, tmp_path: Path
) -> None:
    backbone = load_backbone(str(model_folder))
    bank = random_bank(backbone)
    config = EvaluateConfig.model_validate(
        {
            "backbone": {"name": str(model_folder)},
            "bank": str(bank.save(tmp_path / "bank")),
            "pictures": {"path": str(pictures)},
            "sources": [0, 3],
            "batch_size": 7,
        }
    )
    result = json.loads(evaluate(config, tmp_path / "out").read_text())
    assert [(row["source"], row["target"]) for row in result["rows"]] == [
        (source, target) for source in (0, 3) for target in range(5)
    ]
    row = next(row for row in result["rows"] if (row["source"], row["target"]) == (3, 1))

    ((images, labels),) = evaluation_batches(backbone, [PicturesConfig(path=str(pictures))])
    expected = forward(backbone.model, images, 3).log_softmax(-1)
    for what, delta in (("plain", None), ("bank", compose(bank, 3, 1))):
        logits = forward(backbone.model, images, 1, delta)
        kl = (expected.exp() * (expected - logits.log_softmax(-1))).sum(-1).mean().item()
        assert row[what]["kl"] == pytest.approx(kl, abs=2e-5)
        hits = (logits.argmax(-1) == labels).float().mean().item()
        assert row[what]["top1"] == pytest.approx(100 * hits, abs=0.01)
    same = next(row for row in result["rows"] if row["source"] == row["target"] == 0)
    assert same["plain"] | {"top1": 0} == {"top1": 0, "agreement": 100.0, "kl": 0.0}
    assert "bank" not in same
    assert (tmp_path / "out" / "evaluation.md").read_text().count("\n| ") == 11
    for suffix in ("svg", "png"):
        assert (tmp_path / "out" / f"evaluation.{suffix}").stat().st_size > 1000


def test_folders_are_classes_by_name_by_number_or_by_order(
    pictures: Path, model_folder: Path, tmp_path: Path
) -> None:
    backbone = load_backbone(str(model_folder))
    picture = (pictures.parent / "red" / "0.png").read_bytes()

    def folders(*names: str) -> str:
        root = tmp_path / "-".join(names)
        for name in names:
            (root / name).mkdir(parents=True)
            (root / name / "0.png").write_bytes(picture)
        return str(root)

    assert class_indices(str(pictures), backbone) == [0, 1, 2]
    assert class_indices(folders("red", "blue"), backbone) == [0, 2]
    assert class_indices(folders("0001", "0002"), backbone) == [1, 2]
    assert class_indices(folders("x", "y", "z"), backbone) == [0, 1, 2]
    with pytest.raises(DataError, match="2 folders .* neither numbers nor names of the 3 classes"):
        class_indices(folders("x", "y"), backbone)
