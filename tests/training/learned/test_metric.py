"""A metric that is learned without labels: what learns when, and what comes out."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from adapters import Bank, compose
from adapters.bank import learned_with
from adapters.ladder import REDUCTION
from tests.training.test_distill import metrics, recipe
from tocom import BankError, ConfigError, ReductionError, Variant, cost, forward, load_backbone
from tocom.reduction import DTEM
from tocom.vit import embed, run_blocks
from training.config import DistillConfig, ElasticConfig
from training.distill import Distillation, distill
from training.elastic import ElasticTuning
from training.evaluate import evaluate
from training.ladders.compare import compare_methods
from training.ladders.compare_config import CompareConfig
from training.learned.metric import leading_directions
from training.learned.weights import check_learns
from training.measuring_config import EvaluateConfig
from training.pictures.batches import evaluation_batches
from training.pictures.config import PicturesConfig
from training.program.dry_run import dry_run
from training.run_folder import RunFolder


def learning(pictures: Path, model_folder: Path, **changes: Any) -> DistillConfig:
    metric = {"channels": 8, "share": 0.5} | changes.pop("metric", {})
    return recipe(pictures, model_folder, max_rate=4, metric=metric, **changes)


def job_of(config: DistillConfig) -> Distillation:
    unseen = [torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(5))]
    return Distillation(load_backbone(config.backbone.name), config, unseen)


def micros_of(job: Distillation, metric: bool) -> list[int]:
    return [micro for micro in range(40) if job._of_metric(micro) == metric]


def test_the_metric_learns_from_the_stock_model_and_the_plugins_in_other_micro_batches(
    pictures: Path, model_folder: Path
) -> None:
    job = job_of(learning(pictures, model_folder, dropout=0))
    metric, others = micros_of(job, True), micros_of(job, False)
    assert 10 < len(metric) < 30
    assert all(source == 0 for micro in metric for source, _ in job._rates(micro))
    assert any(source for micro in others for source, _ in job._rates(micro))
    for micro, learns in ((metric[0], "metric"), (others[0], "steps")):
        for loss in job.losses(torch.randn(6, 3, 32, 32), torch.zeros(6), micro):
            loss.backward()  # type: ignore[no-untyped-call]
        moved = {
            name.partition(".")[0]
            for name, each in job.plugins.named_parameters()
            if each.grad is not None and each.grad.any()
        }
        assert moved == {learns}
        # Several processes wait for all of them.
        assert all(each.grad is not None for each in job.plugins.parameters())
        job.plugins.zero_grad()


def test_its_loss_falls(pictures: Path, model_folder: Path) -> None:
    job = job_of(learning(pictures, model_folder, metric={"share": 1.0}, sources=1))
    images = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.Adam(job.plugins.parameters(), 0.02)
    micro = next(each for each in range(40) if job._rates(each) == [(0, [4])])
    losses = []
    for _ in range(12):
        (loss,) = job.losses(images, torch.zeros(8), micro)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


def test_an_interrupted_run_is_the_same_and_its_bank_runs_by_what_was_learned(
    pictures: Path, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = learning(pictures, model_folder)
    whole = Bank.load(distill(config, tmp_path / "whole"))
    note = RunFolder.note

    def stops(self: RunFolder, line: dict[str, Any]) -> None:
        note(self, line)
        if line["step"] == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(RunFolder, "note", stops)
    with pytest.raises(KeyboardInterrupt):
        distill(config, tmp_path / "cut")
    monkeypatch.undo()
    resumed = Bank.load(distill(config, tmp_path / "cut"))
    assert resumed.info.digest == whole.info.digest
    assert metrics(tmp_path / "cut") == metrics(tmp_path / "whole")

    assert whole.ladder.name == "tome-dtem"
    assert whole.ladder.method == DTEM(channels=8)
    assert whole.info.format_version == 2
    backbone = load_backbone(str(model_folder))
    whole.check_fits(backbone)
    images = torch.randn(2, 3, 32, 32)
    learned = learned_with(backbone, whole)
    for source, target in ((0, 4), (1, 3), (4, 2)):
        delta = compose(whole, source, target)
        assert len(delta.pairs) == 4  # q and v of two blocks
        logits = forward(
            backbone.model, images, target, delta, ladder=whole.ladder, learned=learned
        )
        assert logits.isfinite().all()
    with pytest.raises(ReductionError, match="'dtem' runs with weights .*: distil a bank"):
        forward(backbone.model, images, 2, ladder=whole.ladder)


def test_a_bank_with_a_metric_is_read_strictly(
    pictures: Path, model_folder: Path, tmp_path: Path
) -> None:
    config = learning(pictures, model_folder, loop={"steps": 1})
    bank = Bank.load(distill(config, tmp_path / "run"))
    names = {name for name in bank.tensors if name.startswith(REDUCTION)}
    assert names == {f"reduction.{i}.{part}" for i in range(2) for part in ("weight", "bias")}
    info = bank.info.model_copy(update={"digest": ""})
    for name, tensor, said in (
        ("reduction.1.bias", None, "lacks tensor reduction.1.bias"),
        ("reduction.2.bias", torch.zeros(8).half(), "has an unknown tensor reduction.2.bias"),
        ("reduction.0.bias", torch.zeros(9).half(), r"reduction.0.bias must be \[8\], got \[9\]"),
        ("reduction.0.bias", torch.full((8,), torch.nan).half(), "holds NaN"),
    ):
        tensors = dict(bank.tensors)
        if tensor is None:
            del tensors[name]
        else:
            tensors[name] = tensor
        with pytest.raises(BankError, match=said):
            Bank(info, tensors)
    other = {**bank.tensors, "reduction.0.bias": bank.tensors["reduction.0.bias"] + 1}
    with pytest.raises(BankError, match="does not match its digest"):
        Bank(bank.info, other)
    written = json.loads((tmp_path / "run" / "bank" / "bank.json").read_text())
    assert written["method"] == "dtem"


def test_a_share_of_one_leaves_the_plugins_at_nothing(
    pictures: Path, model_folder: Path, tmp_path: Path
) -> None:
    config = learning(pictures, model_folder, metric={"share": 1.0}, loop={"steps": 2})
    bank = Bank.load(distill(config, tmp_path / "run"))
    assert not any(x.any() for name, x in bank.tensors.items() if name.endswith(".B"))


@pytest.fixture(scope="module")
def learned(pictures: Path, model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a bank with a metric, away from nothing."""
    config = learning(pictures, model_folder, targets=("q",), rank=1)
    job = job_of(config)
    info = job.plugins.info.model_copy(update={"name": "learned"})
    torch.manual_seed(3)
    tensors = {name: 0.2 * torch.randn(x.shape) for name, x in job.plugins.tensors().items()}
    return Bank(info, tensors).save(tmp_path_factory.mktemp("learned") / "bank")


def kl_of(model_folder: Path, pictures: Path, learned: Path, rate: int, plain: bool) -> float:
    """The mean KL divergence to the stock model, of single forwards."""
    backbone, bank = load_backbone(str(model_folder)), Bank.load(learned)
    ((images, _),) = evaluation_batches(backbone, [PicturesConfig(path=str(pictures))])
    delta = None if plain else compose(bank, 0, rate)
    answer = forward(
        backbone.model, images, rate, delta, ladder=bank.ladder,
        learned=learned_with(backbone, bank),
    )  # fmt: skip
    stock = forward(backbone.model, images).log_softmax(-1)
    return (stock.exp() * (stock - answer.log_softmax(-1))).sum(-1).mean().item()


def test_a_bank_is_evaluated_by_its_metric(
    pictures: Path, model_folder: Path, learned: Path, tmp_path: Path
) -> None:
    config = EvaluateConfig.model_validate(
        {
            "backbone": {"name": str(model_folder)}, "bank": str(learned),
            "pictures": {"path": str(pictures)}, "batch_size": 7, "workers": 0,
            "sources": [0, 2], "targets": [0, 3, 4],
        }
    )  # fmt: skip
    result = json.loads(evaluate(config, tmp_path / "run").read_text())
    assert result["ladder"]["method"] == "dtem"
    rows = {(row["source"], row["target"]): row for row in result["rows"]}
    for plain, way in ((True, "plain"), (False, "bank")):
        expected = kl_of(model_folder, pictures, learned, 4, plain)
        assert rows[0, 4][way]["kl"] == pytest.approx(expected, rel=1e-3, abs=1e-6)


def test_a_bank_is_compared_by_its_metric(
    pictures: Path, model_folder: Path, learned: Path, tmp_path: Path
) -> None:
    config = CompareConfig.model_validate(
        {
            "backbone": {"name": str(model_folder)}, "entries": [{"bank": str(learned)}],
            "pictures": {"path": str(pictures)}, "batch_size": 7, "workers": 0, "shares": [0.85],
        }
    )  # fmt: skip
    rows = json.loads(compare_methods(config, tmp_path / "run").read_text())["rows"]
    plain, repaired = (
        next(row for row in rows if row["rung"] and row["bank"] == way) for way in (False, True)
    )
    bank = Bank.load(learned)
    assert repaired["parameters"] - plain["parameters"] == bank.plugins
    stock = next(row for row in rows if row["name"] == "stock")
    assert plain["parameters"] - stock["parameters"] == bank.parameters - bank.plugins
    for row in (plain, repaired):
        expected = kl_of(model_folder, pictures, learned, row["rung"], row is plain)
        assert row["kl"] == pytest.approx(expected, rel=1e-3, abs=1e-6)
    backbone = load_backbone(str(model_folder))
    macs = cost(backbone.model, plain["rung"], ladder=bank.ladder).macs
    assert plain["gmacs"] == macs / 1e9


def test_tuning_on_its_ladder_is_refused(model_folder: Path, learned: Path) -> None:
    model = load_backbone(str(model_folder)).model
    with pytest.raises(ConfigError, match="'dtem' learns without labels, as part of a bank"):
        check_learns(Bank.load(learned).ladder, 2, model)


def test_what_a_metric_cannot_begin_from_is_refused(pictures: Path, model_folder: Path) -> None:
    with pytest.raises(ValidationError, match="a metric begins from held-out pictures"):
        learning(pictures, model_folder, unseen=0)
    with pytest.raises(ConfigError, match="at most the width of the model, 24, got 25"):
        job_of(learning(pictures, model_folder, metric={"channels": 25}))


def test_it_begins_with_the_leading_directions_of_the_tokens(model_folder: Path) -> None:
    model = load_backbone(str(model_folder)).model
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    first, _ = run_blocks(model, embed(model, images), Variant())
    before = embed(model, images), first.x
    for block, x, found in zip(
        model.blocks, before, leading_directions(model, images, 5), strict=True
    ):
        tokens = x + block.attn(block.norm1(x))
        tokens = tokens[:, 1:].flatten(0, 1)
        _, _, rows = torch.linalg.svd(tokens / tokens.norm(dim=1, keepdim=True))
        torch.testing.assert_close((found @ rows[:5].T).abs(), torch.eye(5), atol=1e-3, rtol=0)
    # All of them: cosines are those of the tokens themselves.
    whole = leading_directions(model, images, 24)[1]
    torch.testing.assert_close(whole @ whole.T, torch.eye(24), atol=1e-4, rtol=0)
    assert not any(block.norm2._forward_pre_hooks for block in model.blocks)


def test_a_metric_is_for_tome_alone(pictures: Path, model_folder: Path) -> None:
    with pytest.raises(ConfigError, match="a metric is learned for the method tome.*'topk'"):
        job_of(learning(pictures, model_folder, ladder="topk"))
    dtem = {"method": "dtem", "shares": [0.8]}
    with pytest.raises(ReductionError, match="distil a bank that learns them"):
        job_of(recipe(pictures, model_folder, max_rate=1, ladder=dtem))


def test_a_dry_run_begins_a_metric_from_nothing(
    pictures: Path, model_folder: Path, tmp_path: Path
) -> None:
    said = dry_run(learning(pictures, model_folder), tmp_path / "run")
    assert "4 held out" in said
    with pytest.raises(ConfigError, match="at most the width of the model, 24, got 25"):
        dry_run(learning(pictures, model_folder, metric={"channels": 25}), tmp_path / "run")


def test_elastic_tuning_leaves_it_to_a_bank(pictures: Path, model_folder: Path) -> None:
    config = ElasticConfig.model_validate(
        {
            "backbone": {"name": str(model_folder)}, "pictures": [{"path": str(pictures)}],
            "ladder": {"method": "dtem", "shares": [0.8]}, "max_rate": 1, "students": 1,
            "loop": {"steps": 1, "batch_size": 2, "learning_rate": 1e-3},
        }
    )  # fmt: skip
    with pytest.raises(ConfigError, match="'dtem' is learned in a bank: distil one"):
        ElasticTuning(load_backbone(str(model_folder)), config, [])
