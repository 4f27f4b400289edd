import json
from pathlib import Path
from typing import Any

import pytest
import torch

from adapters import Bank
from tests import oracle_case
from tocom import ConfigError, forward
from tocom.delta import Delta, LowRank
from training import loop
from training.config import DistillConfig
from training.distill import distill, draw_pair, kd_loss


def recipe(pictures: Path, model_folder: Path, **changes: Any) -> DistillConfig:
    values: dict[str, Any] = {
        "name": "tiny",
        "backbone": {"name": str(model_folder)},
        "pictures": [{"path": str(pictures)}],
        "unseen": 4,
        "max_rate": 6,
        "pairs": 2,
        "loop": {
            "steps": 6, "batch_size": 6, "learning_rate": 5e-3, "save_every": 2,
            "watch_every": 3, "workers": 0,
        },
    }  # fmt: skip
    values["loop"] |= changes.pop("loop", {})
    return DistillConfig.model_validate(values | changes)


def metrics(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


@pytest.mark.parametrize("name", ["tocom", "tocom_rank4"])
def test_loss_and_gradients_agree_with_the_reference(name: str) -> None:
    case, tensors = oracle_case.read(name)
    model = oracle_case.build(case, tensors)
    images, rank = tensors["images"], case["rank"]
    for source, target in case["kd"]:
        # The reference's own layout: step i -> i+1 in components dim - k (i+1) ... dim - k i.
        low, high = sorted((source, target))
        rows = slice(rank * (case["steps"] - high), rank * (case["steps"] - low))
        factor = case["scale"] if target > source else -case["scale"]
        plugins = {
            key.removeprefix("plugin."): value.clone().requires_grad_()
            for key, value in tensors.items()
            if key.startswith("plugin.")
        }
        pairs = {}
        for key, down in plugins.items():
            if key.endswith("down.weight"):
                up = plugins[key.replace("down", "up")]
                layer = key.split("_tocom")[0]
                pairs[layer] = LowRank(down[rows], factor * up[:, rows])
        with torch.no_grad():
            teacher = forward(model, images, source)
        student = forward(model, images, target, Delta(pairs))
        # The reference divides by the number of classes as well.
        loss = kd_loss(student, teacher) / teacher.shape[-1]
        loss.backward()
        at = f"kd.{source}-{target}"
        torch.testing.assert_close(teacher, tensors[f"{at}.teacher_logits"], atol=1e-4, rtol=0)
        torch.testing.assert_close(loss.reshape(1), tensors[f"{at}.loss"], atol=1e-6, rtol=1e-3)
        for key, parameter in plugins.items():
            expected = tensors[f"{at}.grad.{key}"]
            assert parameter.grad is not None
            # Gradients are small: compare them at their own size.
            torch.testing.assert_close(
                parameter.grad, expected, atol=1e-3 * expected.abs().max().item(), rtol=1e-3
            )


def test_loss_is_zero_only_for_equal_logits() -> None:
    logits = torch.randn(4, 7)
    assert kd_loss(logits, logits).item() == pytest.approx(0, abs=1e-6)
    assert kd_loss(logits + 3, logits).item() == pytest.approx(0, abs=1e-6)
    assert kd_loss(torch.zeros(4, 7), logits).item() > 0.01


def test_pairs_are_uniform_and_never_equal() -> None:
    counts: dict[tuple[int, int], int] = {}
    for draw in range(4000):
        pair = draw_pair(4, seed=0, draw=draw)
        counts[pair] = counts.get(pair, 0) + 1
    assert set(counts) == {(s, t) for s in range(5) for t in range(5) if s != t}
    assert min(counts.values()) > 130
    assert max(counts.values()) < 280  # 200 each are expected, standard deviation 14


def test_training_repairs_what_merging_breaks(
    pictures: Path, model_folder: Path, tmp_path: Path
) -> None:
    config = recipe(pictures, model_folder, dropout=0, loop={"steps": 60, "watch_every": 60})
    bank = Bank.load(distill(config, tmp_path / "run"))
    last = metrics(tmp_path / "run")[-1]
    assert last["unseen_kl_6_bank"] < 0.9 * last["unseen_kl_6_plain"]
    assert bank.info.max_rate == 6
    assert bank.info.training["samples_seen"] == 360
    assert bank.info.training["distinct_pictures"] == 20


@pytest.mark.parametrize("crash", [1, 4])
def test_interrupted_run_resumes_to_the_same_numbers(
    pictures: Path, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, crash: int
) -> None:
    config = recipe(pictures, model_folder)
    whole = distill(config, tmp_path / "whole")

    note = loop._note

    def die(folder: Path, line: dict[str, Any]) -> None:
        note(folder, line)
        if line["step"] == crash + 1:
            raise SystemExit("killed")

    monkeypatch.setattr(loop, "_note", die)
    with pytest.raises(SystemExit, match="killed"):
        distill(config, tmp_path / "broken")
    monkeypatch.undo()
    resumed = distill(config, tmp_path / "broken")
    assert metrics(tmp_path / "broken") == metrics(tmp_path / "whole")
    # Training notes differ in nothing but time; the digest covers what decides answers.
    assert Bank.load(resumed).info.digest == Bank.load(whole).info.digest


def test_ctrl_c_saves_at_once_and_resumes(
    pictures: Path, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    config = recipe(pictures, model_folder, loop={"save_every": 100})
    note = loop._note

    def interrupt(folder: Path, line: dict[str, Any]) -> None:
        note(folder, line)
        if line["step"] == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(loop, "_note", interrupt)
    with pytest.raises(KeyboardInterrupt):
        distill(config, tmp_path / "run")
    monkeypatch.undo()
    assert "Stopped after step 3" in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-000003"]
    distill(config, tmp_path / "run")
    assert [line["step"] for line in metrics(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]


def test_a_finished_run_is_returned_as_it_is(
    pictures: Path, model_folder: Path, tmp_path: Path
) -> None:
    config = recipe(pictures, model_folder, loop={"steps": 1})
    assert distill(config, tmp_path / "run") == distill(config, tmp_path / "run")


def test_run_folder_of_another_recipe_is_refused(
    pictures: Path, model_folder: Path, tmp_path: Path
) -> None:
    distill(recipe(pictures, model_folder, loop={"steps": 1}), tmp_path / "run")
    (tmp_path / "run" / "bank").rename(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="holds a run of another recipe"):
        distill(recipe(pictures, model_folder, loop={"steps": 2}), tmp_path / "run")


def test_loss_that_is_not_finite_stops_the_run(
    pictures: Path, model_folder: Path, tmp_path: Path
) -> None:
    config = recipe(pictures, model_folder, loop={"learning_rate": 1e30, "steps": 6})
    with pytest.raises(loop.TrainingError, match=r"the loss of step \d is (nan|inf).*pairs"):
        distill(config, tmp_path / "run")
