"""Elastic tuning: who learns from whom, at which rungs, and what comes out."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from tests.training.jobs import metrics
from tocom import TOME, ConfigError, Variant, load_backbone
from tocom.vit import embed, outputs
from training.config import ElasticConfig
from training.elastic import ElasticTuning, draw_rungs, elastic
from training.losses import kd_loss


def recipe(pictures: Path, model_folder: Path, **changes: Any) -> ElasticConfig:
    values: dict[str, Any] = {
        "backbone": {"name": str(model_folder)},
        "pictures": [{"path": str(pictures)}],
        "unseen": 4,
        "max_rate": 6,
        "loop": {
            "steps": 4, "batch_size": 6, "learning_rate": 2e-3, "save_every": 2,
            "watch_every": 2, "workers": 0,
        },
    }  # fmt: skip
    values["loop"] |= changes.pop("loop", {})
    return ElasticConfig.model_validate(values | changes)


def job_of(config: ElasticConfig) -> ElasticTuning:
    backbone = load_backbone(config.backbone.name)
    images = torch.randn(4, *backbone.input_size, generator=torch.Generator().manual_seed(0))
    return ElasticTuning(backbone, config, [images])


def test_rungs_are_distinct_and_all_are_drawn(pictures: Path, model_folder: Path) -> None:
    config = recipe(pictures, model_folder, students=3)
    drawn = [draw_rungs(config, micro) for micro in range(60)]
    assert all(len(set(rungs)) == 3 for rungs in drawn)
    assert {rung for rungs in drawn for rung in rungs} == set(range(7))
    assert draw_rungs(config, 5) == drawn[5]


def test_the_loss_is_that_to_the_stock_model_over_the_root_of_plain_merging(
    pictures: Path, model_folder: Path
) -> None:
    config = recipe(pictures, model_folder, features=0.0, tokens=0.0, students=7)
    job = job_of(config)
    (images,) = job.unseen
    losses = [*job.losses(images, torch.zeros(4, dtype=torch.long), 0)]
    model = job.teacher
    with torch.no_grad():
        tokens = embed(model, images)
        stock = outputs(model, tokens, Variant()).logits
        for rung, loss in zip(draw_rungs(config, 0), losses, strict=True):
            plain = kd_loss(outputs(model, tokens, Variant(rung)).logits, stock)
            assert float(loss) == pytest.approx(float(plain) / job.weights[rung] / 7, abs=1e-6)
            if rung:  # untrained, each rung costs what plain merging does
                assert float(loss) == pytest.approx(float(plain) ** 0.5 / 7, rel=1e-3)


def test_only_the_student_learns(pictures: Path, model_folder: Path) -> None:
    job = job_of(recipe(pictures, model_folder))
    (images,) = job.unseen
    for loss in job.losses(images, torch.zeros(4, dtype=torch.long), 0):
        loss.backward()
    assert all(parameter.grad is None for parameter in job.teacher.parameters())
    learned = [name for name, each in job.student.named_parameters() if each.grad is not None]
    assert {"patch_embed.proj.weight", "pos_embed", "head.weight"} <= set(learned)


def test_a_model_folder_comes_out_that_says_where_it_is_from(
    pictures: Path, model_folder: Path, tmp_path: Path
) -> None:
    config = recipe(pictures, model_folder)
    before = load_backbone(str(model_folder))
    made = load_backbone(str(elastic(config, tmp_path)))
    assert made.tuned_from == before.digest != made.digest
    assert made.class_names == before.class_names
    assert made.source == 0
    last = metrics(tmp_path)[-1]
    assert {"unseen_kl_0", "unseen_kl_1", "unseen_kl_6"} <= set(last)
    assert elastic(config, tmp_path) == tmp_path / "model"  # is there: nothing is done again


def test_the_model_says_which_attention_it_learned_with(
    pictures: Path, model_folder: Path, tmp_path: Path
) -> None:
    config = recipe(pictures, model_folder, proportional=False, loop={"steps": 1})
    assert not load_backbone(str(elastic(config, tmp_path))).proportional


def test_a_model_may_be_tuned_for_chosen_rates_alone(
    pictures: Path, model_folder: Path, tmp_path: Path
) -> None:
    two = recipe(pictures, model_folder, rates=[2, 5])
    assert {rung for micro in range(20) for rung in draw_rungs(two, micro)} == {2, 5}
    one = recipe(pictures, model_folder, rates=[5], students=1)
    assert draw_rungs(one, 3) == [5]
    made = load_backbone(str(elastic(one, tmp_path)))
    assert (made.source, made.ladder) == (5, TOME)


def test_the_model_names_the_ladder_that_it_was_tuned_on(
    pictures: Path, model_folder: Path, tmp_path: Path
) -> None:
    rungs = {"method": "topk", "shares": [0.8, 0.7]}
    config = recipe(pictures, model_folder, ladder=rungs, max_rate=1, loop={"steps": 1})
    assert load_backbone(str(elastic(config, tmp_path))).ladder.name == "topk"


def test_a_resumed_run_makes_the_same_model(
    pictures: Path, model_folder: Path, tmp_path: Path
) -> None:
    config = recipe(pictures, model_folder)
    whole = load_backbone(str(elastic(config, tmp_path / "whole")))
    half = tmp_path / "half"
    elastic(config, half)
    for made in (half / "model", half / "checkpoints" / "step-000004"):
        made.rename(tmp_path / f"lost-{made.name}")
    again = load_backbone(str(elastic(config, half)))
    assert again.digest == whole.digest


def test_what_is_wrong_is_named(pictures: Path, model_folder: Path) -> None:
    with pytest.raises(ValidationError, match=r"students \(8\) have distinct rates: at most 7, "):
        recipe(pictures, model_folder, students=8)
    with pytest.raises(ValidationError, match=r"students \(2\) have distinct rates: at most 1, "):
        recipe(pictures, model_folder, rates=[6])
    for rates in ([7], [-1], [2, 2]):
        with pytest.raises(ValidationError, match="rates must be distinct, of 0 to max_rate"):
            recipe(pictures, model_folder, rates=rates, students=1)
    rungs = {"method": "topk", "shares": [0.7]}
    with pytest.raises(ConfigError, match=r"max_rate \(6\) must be a rung of the ladder 'topk'"):
        job_of(recipe(pictures, model_folder, ladder=rungs))
    several = replace(load_backbone(str(model_folder)), multi_label=True)
    with pytest.raises(ConfigError, match="scores several classes a picture; elastic tuning is"):
        ElasticTuning(several, recipe(pictures, model_folder), [])
