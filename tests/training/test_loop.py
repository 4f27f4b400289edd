"""Killed runs, full disks: what a loop must survive."""

import logging
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import SGD
from torch.utils._python_dispatch import TorchDispatchMode

from adapters import Bank
from tests.tocom_models import small_model
from tests.training.jobs import Brightness, environment, metrics, run_job
from tocom import TOME, Backbone, ConfigError, load_backbone
from training import loop
from training.config import DistillConfig, FinetuneConfig
from training.distill import Distillation, distill
from training.elastic import Weights
from training.loop_config import LoopConfig
from training.presets import read_recipe
from training.run_folder import RunFolder, TrainingError
from training.tuning import Finetuning, Tuned

RECIPE = """
name = "tiny"
max_rate = 6
sources = 2
students = 2
pictures = [{{ path = "{pictures}" }}]
[backbone]
name = "{backbone}"
[augment]
mixup = 0.8
cutmix = 1.0
erasing = 0.5
repeats = 3
[loop]
steps = 6
batch_size = 8
learning_rate = 5e-3
save_every = 1
workers = 0
"""


@pytest.fixture
def recipe(pictures: Path, model_folder: Path, tmp_path: Path) -> Path:
    path = tmp_path / "tiny.toml"
    path.write_text(RECIPE.format(pictures=pictures, backbone=model_folder))
    return path


def config(recipe: Path, *overrides: str) -> DistillConfig:
    return read_recipe(DistillConfig, str(recipe), overrides)


def test_accumulation_is_the_whole_batch(
    pictures: Path, model_folder: Path, tmp_path: Path
) -> None:
    weights = []
    for accumulation in (1, 4):
        # Clipping lets the size of gradients count, which AdamW alone does not see.
        loop_config = LoopConfig(
            steps=3, batch_size=8, accumulation=accumulation, learning_rate=0.1, clip_norm=0.05,
            workers=0,
        )  # fmt: skip
        folder, job = tmp_path / str(accumulation), Brightness()
        run_job(job, loop_config, pictures, model_folder, folder)
        weights.append(job.module.weight)
        assert metrics(folder)[0]["micros"] == accumulation
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-4, atol=1e-6)


class Reads(TorchDispatchMode):
    """Counts where the program takes a value out of a tensor, for which it waits for a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += op is torch.ops.aten._local_scalar_dense.default
        return op(*args, **(kwargs or {}))


def test_a_step_waits_for_its_device_once(
    pictures: Path, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, to_list = loop.run, torch.Tensor.tolist
    reads, lists = Reads(), list[tuple[int, ...]]()

    def plain_steps(module: torch.nn.Module) -> SGD:
        return SGD(module.parameters(), 0.1)  # on the CPU AdamW reads its own count of steps

    def watched(*arguments: Any) -> None:
        with reads:
            run(*arguments)

    monkeypatch.setattr(LoopConfig, "make_optimizer", lambda _, module: plain_steps(module))
    monkeypatch.setattr(loop, "run", watched)
    monkeypatch.setattr(torch.Tensor, "tolist", lambda t: lists.append(t.shape) or to_list(t))
    loop_config = LoopConfig(
        steps=3, batch_size=8, accumulation=2, learning_rate=0.1, clip_norm=1.0, workers=1
    )
    run_job(Brightness(), loop_config, pictures, model_folder, tmp_path)
    assert reads.count == 1  # a seed for the processes that decode, before the first step
    assert lists == [(24,), (3,), (3,), (3,)]  # the order of the pictures, and three steps


class Still(Brightness):
    """Nothing has a gradient: what changes has decayed."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.module = module

    def losses(self, images: Tensor, labels: Tensor, micro: int) -> Iterator[Tensor]:
        yield torch.stack([0 * parameter.sum() for parameter in self.module.parameters()]).sum()


def test_biases_norms_positions_and_prefix_tokens_do_not_decay(
    pictures: Path, model_folder: Path, tmp_path: Path
) -> None:
    model = load_backbone(str(model_folder)).model.requires_grad_(True)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    loop_config = LoopConfig(
        steps=1, batch_size=8, learning_rate=0.1, weight_decay=0.5, workers=0
    )  # fmt: skip
    run_job(Still(Tuned(model, 0)), loop_config, pictures, model_folder, tmp_path)
    for name, parameter in model.named_parameters():
        kept = parameter.ndim == 1 or name in ("cls_token", "pos_embed")
        torch.testing.assert_close(parameter, before[name] * (1 if kept else 0.95))


@pytest.mark.parametrize("whole", ["finetune", "elastic"])
@pytest.mark.parametrize("kind", ["vit_tiny", "deit_tiny_distilled", "dinov2_registers"])
def test_what_tunes_all_weights_lets_nothing_decay_that_timm_keeps(kind: str, whole: str) -> None:
    model = small_model(kind)
    said = {
        "name": "tiny",
        "backbone": {"name": "none"},
        "pictures": {"path": "none"},
        "test": {"path": "none"},
        "loop": {"epochs": 1, "batch_size": 1, "learning_rate": 1.0},
    }
    module: torch.nn.Module = Weights(model, TOME, proportional=True)
    if whole == "finetune":
        backbone = Backbone(model, kind, kind, ())
        module = Finetuning(backbone, FinetuneConfig.model_validate(said), 3).module
    run = LoopConfig(steps=1, batch_size=1, learning_rate=1.0, weight_decay=0.5)
    optimizer = run.make_optimizer(module)
    decays = {
        id(parameter): group["weight_decay"]
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    kept = {name for name in model.no_weight_decay() if hasattr(model, name)}
    assert kept >= {"cls_token", "pos_embed"}
    for name, parameter in model.named_parameters():
        expected = 0.0 if parameter.ndim == 1 or name in kept else 0.5
        assert decays.pop(id(parameter)) == expected, name
    assert not decays


def test_a_batch_that_cannot_be_shared_out_is_refused(recipe: Path) -> None:
    with pytest.raises(ConfigError, match=r"batch_size \(8\) must be a multiple of accum.*\(3\)"):
        config(recipe, "loop.accumulation=3")


def test_mixing_an_odd_micro_batch_is_refused(recipe: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="mixed in pairs, and a micro-batch has 7"):
        distill(config(recipe, "loop.batch_size=7"), tmp_path / "run")


def test_more_sources_than_pictures_are_refused(recipe: Path) -> None:
    with pytest.raises(ConfigError, match=r"sources \(3\) share out a micro-batch: at most 2"):
        config(recipe, "loop.batch_size=4", "loop.accumulation=2", "sources=3")
    # Several processes make the micro-batches smaller.
    asked = config(recipe, "augment.mixup=0", "augment.cutmix=0", "sources=3")
    job = Distillation(load_backbone(asked.backbone.name), asked, [])
    losses = job.losses(torch.zeros(2, 3, 32, 32), torch.zeros(2), 0)
    with pytest.raises(ConfigError, match="2 pictures cannot be shared out to 3 sources"):
        next(losses)


#: tocom-train, killed while it writes the line of step 4.
KILLED = """
import os, signal
from training import cli, run_folder

note = run_folder.RunFolder.note

def die(self, line):
    if line["step"] == 4:
        with (self.folder / "metrics.jsonl").open("a") as file:
            file.write('{"step": 4, "lo')
        os.kill(os.getpid(), signal.SIGKILL)
    note(self, line)

run_folder.RunFolder.note = die
cli.main()
"""


def test_killed_run_resumes_to_the_same_bank(recipe: Path, tmp_path: Path) -> None:
    whole = distill(config(recipe), tmp_path / "whole")
    command = [
        sys.executable, "-c", KILLED, "distill", str(recipe), "--folder", str(tmp_path / "killed")
    ]  # fmt: skip
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not (tmp_path / "killed" / "bank").exists()
    resumed = distill(config(recipe), tmp_path / "killed")
    assert Bank.load(resumed).info.digest == Bank.load(whole).info.digest
    assert [line["step"] for line in metrics(tmp_path / "killed")] == [1, 2, 3, 4, 5, 6]


def test_full_disk_stops_with_the_last_whole_checkpoint_named(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill_disk_after(3, monkeypatch)
    with pytest.raises(TrainingError, match="No space left.*last whole checkpoint: step-000003"):
        distill(config(recipe), tmp_path / "run")
    monkeypatch.undo()
    whole = distill(config(recipe), tmp_path / "whole")
    resumed = distill(config(recipe), tmp_path / "run")
    assert Bank.load(resumed).info.digest == Bank.load(whole).info.digest


def test_full_disk_is_survived_when_the_recipe_says_so(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    fill_disk_after(3, monkeypatch)
    with caplog.at_level(logging.WARNING):
        distill(config(recipe, "loop.on_full_disk=skip"), tmp_path / "run")
    assert "step-000004 cannot be written" in caplog.text
    kept = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert kept == ["step-000002", "step-000003"]


def fill_disk_after(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    save = RunFolder.save

    def full(self: RunFolder, at: int) -> None:
        if at > step:
            monkeypatch.setattr(
                self.accelerator, "save_state", lambda path: Path("/dev/full").write_text("x" * 99)
            )
        save(self, at)

    monkeypatch.setattr(RunFolder, "save", full)


@pytest.mark.parametrize("name", ["DeepSpeed", "FSDP", "Megatron-LM"])
def test_accelerate_configurations_that_split_models_up_are_refused(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    # As `accelerate launch` says it to what it starts.
    monkeypatch.setenv(f"ACCELERATE_USE_{name.upper().replace('-', '_')}", "true")
    with pytest.raises(ConfigError, match=f"Accelerate is configured for {name}, which splits"):
        distill(config(recipe), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_tensorboard_gets_the_figures(recipe: Path, tmp_path: Path) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    distill(config(recipe, "loop.tensorboard=true"), tmp_path / "run")
    log = events.EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    log.Reload()
    losses = [event.value for event in log.Scalars("loss")]
    assert losses == pytest.approx([line["loss"] for line in metrics(tmp_path / "run")])


def test_blocks_that_run_again_make_the_same_bank(recipe: Path, tmp_path: Path) -> None:
    digests = [
        Bank.load(distill(config(recipe, "drop_path=0.2", *more), tmp_path / str(i))).info.digest
        for i, more in enumerate([[], ["loop.recompute_blocks=true"]])
    ]
    assert digests[0] == digests[1]


def test_bf16_trains(recipe: Path, tmp_path: Path) -> None:
    bank = Bank.load(distill(config(recipe, "loop.precision=bf16"), tmp_path / "run"))
    assert all(tensor.isfinite().all() for tensor in bank.tensors.values())
