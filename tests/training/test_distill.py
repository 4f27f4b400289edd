import copy
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from adapters import Bank
from tests import oracle_case
from tocom import ConfigError, Variant, forward, forward_features, load_backbone
from tocom.delta import Delta, LowRank
from tocom.vit import State, embed, outputs, run_blocks
from training.config import DistillConfig
from training.distill import Distillation, distill, draw_rates
from training.losses import kd_loss, token_error
from training.run_folder import RunFolder, TrainingError


def recipe(pictures: Path, model_folder: Path, **changes: Any) -> DistillConfig:
    values: dict[str, Any] = {
        "name": "tiny",
        "backbone": {"name": str(model_folder)},
        "pictures": [{"path": str(pictures)}],
        "unseen": 4,
        "max_rate": 6,
        "sources": 2,
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


def all_of_it(model: Any, images: torch.Tensor, rate: int, delta: Any = None) -> torch.Tensor:
    return forward(model, images, rate, delta)


def what_the_head_reads(
    model: Any, images: torch.Tensor, rate: int, delta: Any = None
) -> torch.Tensor:
    return outputs(model, embed(model, images), Variant(rate, delta)).logits


@pytest.mark.parametrize("logits", [all_of_it, what_the_head_reads])
@pytest.mark.parametrize("name", ["tocom", "tocom_rank4"])
def test_loss_and_gradients_agree_with_the_reference(
    name: str, logits: Callable[..., torch.Tensor]
) -> None:
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
            teacher = logits(model, images, source)
        student = logits(model, images, target, Delta(pairs))
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


def drawn(config: DistillConfig, draws: int) -> dict[tuple[int, int], int]:
    counts: dict[tuple[int, int], int] = {}
    for draw in range(draws):
        source, targets = draw_rates(config, draw)
        assert len(set(targets)) == len(targets) == config.students
        for target in targets:
            counts[source, target] = counts.get((source, target), 0) + 1
    assert set(counts) == {
        (s, t) for s in range(config.max_rate + 1) for t in range(config.max_rate + 1) if s != t
    }
    return counts


def test_rates_are_uniform_by_default(pictures: Path, model_folder: Path) -> None:
    counts = drawn(recipe(pictures, model_folder, max_rate=4, students=2), draws=2000)
    assert min(counts.values()) > 130
    assert max(counts.values()) < 280  # 200 each are expected, standard deviation 14


def test_rates_far_apart_and_those_with_zero_can_be_drawn_more_often(
    pictures: Path, model_folder: Path
) -> None:
    config = recipe(
        pictures, model_folder, max_rate=4, pairs="distance", from_zero=0.25, to_zero=0.25
    )
    counts = drawn(config, draws=4000)
    # Distances sum to 40 over all pairs, to 10 from rate 0 and to 10 to it: a quarter of the draws
    # by rule each, and a quarter of the others.
    for end in (0, 1):
        with_zero = sum(count for pair, count in counts.items() if pair[end] == 0)
        assert with_zero == pytest.approx(1500, abs=120)
    assert counts[0, 4] == pytest.approx(4 * counts[0, 1], rel=0.25)
    assert counts[4, 0] == pytest.approx(4 * counts[1, 0], rel=0.25)
    assert counts[4, 1] == pytest.approx(4000 / 2 * 3 / 40, abs=50)


def test_students_beside_the_one_at_zero_have_other_targets(
    pictures: Path, model_folder: Path
) -> None:
    config = recipe(pictures, model_folder, max_rate=4, from_zero=0.5, to_zero=0.5, students=4)
    drawn_to_zero = [rates for rates in (draw_rates(config, i) for i in range(50)) if rates[0]]
    assert 10 < len(drawn_to_zero) < 40
    for source, targets in drawn_to_zero:
        assert targets[0] == 0
        assert sorted([source, *targets]) == [0, 1, 2, 3, 4]


def test_more_students_than_targets_are_refused(pictures: Path, model_folder: Path) -> None:
    with pytest.raises(ValidationError, match=r"students \(5\).*max_rate \+ beyond, which is 4"):
        recipe(pictures, model_folder, max_rate=4, students=5)


def test_shares_of_more_than_all_draws_are_refused(pictures: Path, model_folder: Path) -> None:
    with pytest.raises(ValidationError, match=r"from_zero \(0\.7\) and to_zero \(0\.4\)"):
        recipe(pictures, model_folder, from_zero=0.7, to_zero=0.4)


@pytest.mark.parametrize("targets", [("q", "v"), ("q", "k", "v", "proj", "fc1", "fc2")])
def test_shared_step_has_the_gradients_of_the_straightforward_one(
    pictures: Path, model_folder: Path, targets: tuple[str, ...]
) -> None:
    config = recipe(
        pictures, model_folder, sources=2, students=3, dropout=0, targets=targets, features=0.5,
        tokens=0.3,
    )  # fmt: skip
    backbone = load_backbone(config.backbone.name)
    job = Distillation(backbone, config, [])
    for parameter in job.plugins.parameters():
        torch.nn.init.normal_(parameter, std=0.1)  # where B is zero, A has no gradient
    images = torch.randn(5, 3, 32, 32)
    losses = list(job.losses(images, torch.zeros(5), micro=3))
    assert len(losses) == job.losses_each == 6
    torch.stack(losses).sum().backward()

    plugins = copy.deepcopy(job.plugins)
    plugins.zero_grad()
    pairs = job.notes(range(3, 4))["pairs"]
    total, seen = torch.zeros(()), []
    for pair, loss in zip(pairs, losses, strict=True):
        share = images[:3] if len(seen) < 3 else images[3:]
        seen.append(pair)
        with torch.no_grad():
            teacher = forward(backbone.model, share, pair[0])
            read = forward_features(backbone.model, share, pair[0])[:, 0]
            states = states_of(backbone.model, share, pair[0])
        student = forward(backbone.model, share, pair[1], plugins(*pair))
        reads = forward_features(backbone.model, share, pair[1], plugins(*pair))[:, 0]
        mine = states_of(backbone.model, share, pair[1], plugins(*pair))
        expected = kd_loss(student, teacher) + 0.5 * (reads - read).square().mean()
        expected = expected + 0.3 * token_error(mine, states)
        expected = expected * len(share) / 5 / 3
        torch.testing.assert_close(loss, expected, atol=1e-6, rtol=1e-5)
        total = total + expected
    total.backward()
    for fast, slow in zip(job.plugins.parameters(), plugins.parameters(), strict=True):
        assert fast.grad is not None
        assert slow.grad is not None
        torch.testing.assert_close(fast.grad, slow.grad, atol=1e-5 * slow.grad.abs().max(), rtol=0)


def test_a_step_reads_nothing_that_a_gpu_computes(pictures: Path, model_folder: Path) -> None:
    config = recipe(
        pictures, model_folder, students=2, features=0.5, tokens=0.3, drop_path=0.2,
        augment={"mixup": 0.8, "cutmix": 1.0},
    )  # fmt: skip
    job = Distillation(load_backbone(config.backbone.name), config, [])
    for module in (job.teacher, job.student, job.plugins):
        module.to("meta")  # where tensors have no values: whoever needs one raises
    images, labels = torch.empty(4, 3, 32, 32, device="meta"), torch.zeros(4, device="meta")
    for loss in job.losses(images, labels, micro=1):
        loss.backward()
    assert all(parameter.grad is not None for parameter in job.plugins.parameters())


def test_watching_reads_once_and_weighs_batches_by_their_pictures(
    pictures: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone, config = load_backbone(str(model_folder)), recipe(pictures, model_folder, max_rate=4)
    images = torch.randn(5, 3, 32, 32)
    job = Distillation(backbone, config, [images[:3], images[3:]])
    lists, to_list = list[int](), torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda t: lists.append(t.numel()) or to_list(t))
    noted = job.watch()
    assert lists == [8]  # four rates, with and without the bank
    assert noted == pytest.approx(Distillation(backbone, config, [images]).watch(), abs=1e-6)
    assert Distillation(backbone, config, []).watch() == {}


def states_of(
    model: Any, images: torch.Tensor, rate: int, delta: Delta | None = None
) -> list[State]:
    return list(run_blocks(model, embed(model, images), Variant(rate, delta), trace=True))[:-1]


def test_relative_losses_are_shares_of_what_plain_merging_costs(
    pictures: Path, model_folder: Path
) -> None:
    backbone = load_backbone(str(model_folder))
    images = torch.rand(6, 3, 32, 32)
    plain = Distillation(backbone, recipe(pictures, model_folder, sources=1), [images])
    config = recipe(pictures, model_folder, sources=1, relative=True)
    relative = Distillation(backbone, config, [images])
    labels = torch.zeros(6, dtype=torch.long)
    for micro in range(8):
        (as_it_is,) = plain.losses(images, labels, micro)
        # These are the pictures that it was measured on, and plug-ins do nothing yet.
        (share,) = relative.losses(images, labels, micro)
        assert as_it_is > 0
        assert share.item() == pytest.approx(1, rel=1e-4)
        share.backward()  # what was measured takes part in no graph


def test_relative_losses_need_pictures_to_measure_on(pictures: Path, model_folder: Path) -> None:
    with pytest.raises(ValidationError, match="give unseen, such as unseen=96"):
        recipe(pictures, model_folder, relative=True, unseen=0)


def test_only_plugins_have_gradients_and_the_backbone_stays_as_it_is(
    pictures: Path, model_folder: Path, tmp_path: Path
) -> None:
    config = recipe(pictures, model_folder, drop_path=0.2)
    before = load_backbone(config.backbone.name).digest
    backbone = load_backbone(config.backbone.name)
    job = Distillation(backbone, config, [])
    for loss in job.losses(torch.randn(4, 3, 32, 32), torch.zeros(4), micro=0):
        loss.backward()
    assert all(parameter.grad is None for parameter in backbone.model.parameters())
    assert all(parameter.grad is not None for parameter in job.plugins.parameters())
    assert not any(module.training for module in job.teacher.modules())
    distill(config, tmp_path / "run")
    assert backbone.digest == before


def test_steps_can_share_their_basis(pictures: Path, model_folder: Path, tmp_path: Path) -> None:
    own = Bank.load(distill(recipe(pictures, model_folder), tmp_path / "own"))
    shared = Bank.load(distill(recipe(pictures, model_folder, basis="shared"), tmp_path / "shared"))
    for name, tensor in shared.tensors.items():
        assert tensor.shape == own.tensors[name].shape
        first = tensor[:1].expand_as(tensor)
        assert torch.equal(tensor, first) == name.endswith(".A")


def test_stochastic_depth_is_the_students_alone_and_shares_the_weights(
    pictures: Path, model_folder: Path
) -> None:
    config = recipe(pictures, model_folder, drop_path=0.9)
    job = Distillation(load_backbone(config.backbone.name), config, [])
    images = torch.randn(64, 3, 32, 32)
    assert torch.equal(forward(job.teacher, images), forward(job.teacher, images))
    assert not torch.equal(forward(job.student, images), forward(job.student, images))
    for ours, theirs in zip(job.student.parameters(), job.teacher.parameters(), strict=True):
        assert ours is theirs


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


def test_rates_beyond_are_trained_and_left_out(
    pictures: Path, model_folder: Path, tmp_path: Path
) -> None:
    whole = Bank.load(distill(recipe(pictures, model_folder), tmp_path / "whole"))
    config = recipe(pictures, model_folder, max_rate=4, beyond=2)
    bank = Bank.load(distill(config, tmp_path / "part"))
    assert (bank.info.max_rate, bank.info.training["recipe"]["beyond"]) == (4, 2)
    for name, tensor in bank.tensors.items():
        torch.testing.assert_close(tensor, whole.tensors[name][:4], rtol=0, atol=0)


@pytest.mark.parametrize("crash", [1, 4])
def test_interrupted_run_resumes_to_the_same_numbers(
    pictures: Path, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, crash: int
) -> None:
    config = recipe(pictures, model_folder)
    whole = distill(config, tmp_path / "whole")

    note = RunFolder.note

    def die(self: RunFolder, line: dict[str, Any]) -> None:
        note(self, line)
        if line["step"] == crash + 1:
            raise SystemExit("killed")

    monkeypatch.setattr(RunFolder, "note", die)
    with pytest.raises(SystemExit, match="killed"):
        distill(config, tmp_path / "broken")
    monkeypatch.undo()
    resumed = distill(config, tmp_path / "broken")
    assert metrics(tmp_path / "broken") == metrics(tmp_path / "whole")
    # Training notes differ in nothing but time; the digest covers what decides answers.
    assert Bank.load(resumed).info.digest == Bank.load(whole).info.digest


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_sigterm_save_after_the_step_and_resume(
    pictures: Path, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str], number: int,
) -> None:  # fmt: skip
    config = recipe(pictures, model_folder, loop={"save_every": 100})
    note = RunFolder.note

    def interrupt(self: RunFolder, line: dict[str, Any]) -> None:
        note(self, line)
        if line["step"] == 3:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(RunFolder, "note", interrupt)
    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt):
        distill(config, tmp_path / "run")
    assert signal.getsignal(number) is before
    monkeypatch.undo()
    assert "Stopped after step 3" in capsys.readouterr().err
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
    other = recipe(pictures, model_folder, loop={"steps": 2}, rank=3)
    with pytest.raises(ConfigError, match=r"a run of another recipe: rank 2 there, 3 here;"):
        distill(other, tmp_path / "run")  # its bank is not what is asked for
    (tmp_path / "run" / "bank").rename(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match=r"a run of another recipe: rank 2 there, 3 here;"):
        distill(other, tmp_path / "run")


@pytest.mark.parametrize("text", ['{"name": "ti', "[1, 2]", "7"])
def test_run_folder_that_does_not_say_what_it_holds_is_refused(
    pictures: Path, model_folder: Path, tmp_path: Path, text: str
) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=r"config\.json does not say which run"):
        distill(recipe(pictures, model_folder, loop={"steps": 1}), tmp_path)


def test_loss_that_is_not_finite_stops_the_run(
    pictures: Path, model_folder: Path, tmp_path: Path
) -> None:
    config = recipe(pictures, model_folder, loop={"learning_rate": 1e30, "steps": 6})
    with pytest.raises(TrainingError, match=r"the loss of step \d is (nan|inf).*pairs"):
        distill(config, tmp_path / "run")
