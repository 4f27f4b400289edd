from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from tests.training.jobs import Brightness, run_job
from tocom import load_backbone
from training.config import AugmentConfig, DistillConfig
from training.loop_config import LoopConfig
from training.pictures.augment import train_transform
from training.pictures.batches import Pictures
from training.screen.header import header, length


def test_a_run_says_what_it_is_before_its_first_step(
    pictures: Path, model_folder: Path, tmp_path: Path
) -> None:
    recipe = DistillConfig.model_validate(
        {
            "name": "tiny",
            "backbone": {"name": str(model_folder)},
            "pictures": [{"path": str(pictures), "times": 2}],
            "loop": {"steps": 1000, "batch_size": 8, "learning_rate": 0.1},
        }
    )
    backbone = load_backbone(str(model_folder))
    read = Pictures(recipe.pictures, train_transform(backbone, AugmentConfig()))
    read.hold_out(4)
    keys = 2 * read.keys()
    accelerator = Accelerator(cpu=True)
    said = header(accelerator, recipe.loop, recipe.backbone, read, keys, tmp_path)
    threads = torch.get_num_threads()
    assert said.splitlines() == [
        f"device    cpu, {threads} thread{'s' * (threads > 1)}",
        f"backbone  {model_folder}",
        "pictures  20 distinct, of 1 set, 4 held out",
        f"folder    {tmp_path}",
    ]
    assert length(recipe.loop, keys, 1234, 400).splitlines() == [
        "learned   1,234 values",
        "steps     1,000 of 8 pictures, each seen 400 times; gone on with after step 400",
    ]


def test_a_job_shows_it_and_says_from_where_it_goes_on(
    pictures: Path, model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = LoopConfig(steps=2, batch_size=6, learning_rate=0.1, workers=0)
    run_job(Brightness(), config, pictures, model_folder, tmp_path)
    said = capsys.readouterr().err
    assert "learned   12 values\n" in said
    assert "steps     2 of 6 pictures, each seen 0.5 times\n" in said
    run_job(Brightness(), config, pictures, model_folder, tmp_path)
    assert "each seen 0.5 times; gone on with after step 2\n" in capsys.readouterr().err


def test_a_learning_rate_that_never_reaches_its_peak_is_told(
    pictures: Path, model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = "the learning rate rises for 2 steps and the run has 2: it never reaches its peak\n"
    for warmup, told in ((2, True), (1, False)):
        config = LoopConfig(
            steps=2, batch_size=6, learning_rate=0.1, workers=0, warmup_steps=warmup
        )
        run_job(Brightness(), config, pictures, model_folder, tmp_path / str(warmup))
        assert (said in capsys.readouterr().err) == told
